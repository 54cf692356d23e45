"""What the sentence writer is asked for: kinds of thing, and example sentences by sentiment.

The examples were written by hand for this project.  SmolLM2-135M follows examples much
better than instructions, so each request shows it a few of these before asking for one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Domain = Literal["film", "product"]
Sentiment = Literal["very bad", "bad", "mixed", "good", "very good"]

DOMAINS: tuple[Domain, ...] = ("film", "product")
# Clear opinions are drawn more often than mixed ones: PPO needs both ends within reach.
SENTIMENT_WEIGHTS: dict[Sentiment, float] = {
    "very bad": 0.26,
    "bad": 0.18,
    "mixed": 0.12,
    "good": 0.18,
    "very good": 0.26,
}

KINDS: dict[Domain, tuple[str, ...]] = {
    "film": (
        "film", "film", "film", "movie", "movie", "comedy", "drama", "thriller",
        "horror film", "romance", "documentary", "war film", "science fiction film",
        "animated film", "musical", "crime film", "action film", "family film",
        "children's film", "sequel", "western", "fantasy film", "short film",
    ),
    "product": (
        "product", "product", "phone", "camera", "laptop", "printer", "DVD player",
        "vacuum cleaner", "blender", "coffee maker", "pair of headphones", "speaker",
        "kitchen knife", "backpack", "jacket", "pair of shoes", "chair", "lamp", "tent",
        "toy", "board game", "router", "drill", "watch", "keyboard", "kettle", "mattress",
        "television", "bicycle", "fan heater", "tablet", "suitcase",
    ),
}  # fmt: skip

EXAMPLES: dict[Domain, dict[Sentiment, tuple[str, ...]]] = {
    "film": {
        "very bad": (
            "The plot makes no sense and the actors look as bored as we were.",
            "I wanted my money back after the first twenty minutes of this mess.",
            "The jokes are old and nobody in the whole room laughed at any of them.",
            "This is one of the worst films I have seen in a very long time.",
            "The dialogue is painful to hear and the ending is a complete disaster.",
            "Every scene is ugly, loud and stupid, and the film never seems to end.",
            "The director should be ashamed of such a lazy and boring piece of work.",
            "I hated the story and I hated the characters even more.",
            "It is a terrible waste of a good cast and of two hours of my life.",
            "The special effects look cheap and the acting is simply awful.",
        ),
        "bad": (
            "The story is thin and the film is much too long for it.",
            "The lead actor never seems to believe a word of what he says.",
            "It starts well but soon runs out of ideas and becomes dull.",
            "The characters are flat and I did not care what happened to them.",
            "The music is too loud and tells us what to feel in every scene.",
            "The ending was disappointing and left too many questions open.",
            "I expected more from this director than the same tired jokes.",
            "The pace is slow and the middle of the film drags badly.",
        ),
        "mixed": (
            "The acting is good but the story is nothing new.",
            "The first half is fun and the second half is a little slow.",
            "It is a decent film to watch once on a rainy evening.",
            "The pictures are pretty, but the script needed more work.",
            "Some of the jokes are funny and some of them fall flat.",
            "It is neither as good as the book nor as bad as people say.",
        ),
        "good": (
            "The story is simple, but it is told with care and a sense of humour.",
            "The two leads work well together and their scenes are a pleasure to watch.",
            "The music fits the mood and the pictures are lovely to look at.",
            "I laughed more than I expected and left the cinema in a good mood.",
            "The film is clever, well made and never too long.",
            "The supporting cast is strong and the dialogue feels real.",
            "It is a warm little film with a nice ending for the whole family.",
            "The action is exciting and the villain is great fun.",
        ),
        "very good": (
            "The story is wonderful and the actors are a joy to watch from start to finish.",
            "I loved every minute of it and would happily see it again tomorrow.",
            "The ending moved me to tears in the best possible way.",
            "This is one of the best films I have ever seen in a cinema.",
            "The acting is brilliant and the music is simply beautiful.",
            "Every scene is perfect, and the last one is unforgettable.",
            "The script is funny, smart and full of love for its characters.",
            "It is a masterpiece, and the whole cast is amazing.",
            "The director has made a beautiful film that everyone should see.",
            "The whole audience laughed, cried and clapped at the end.",
        ),
    },
    "product": {
        "very bad": (
            "The battery died after two days and the seller never answered my letters.",
            "It broke the very first time I used it and now it is useless.",
            "The cable is cheap and does not even fit into the plug.",
            "I would not buy this terrible thing again at any price.",
            "The sound is awful and the buttons stopped working within a week.",
            "This is the worst product I have ever bought, a complete waste of money.",
            "The customer service was rude and refused to give my money back.",
            "It arrived broken, dirty and with half of the parts missing.",
            "The handle fell off at once and I nearly burned my hand.",
            "It is loud, ugly and it smells horrible when it gets hot.",
        ),
        "bad": (
            "The screen is dark and hard to read outside.",
            "The instructions are confusing and the setup took me all evening.",
            "It feels cheap and the lid does not close well.",
            "The battery does not last as long as they promised.",
            "It is too heavy to carry and too small to be useful.",
            "The picture is not sharp and the colours look wrong.",
            "It stopped working after a month, which is disappointing.",
            "The software is slow and it often loses the connection.",
        ),
        "mixed": (
            "It works well enough, but it is louder than I expected.",
            "The quality is fine for the price, though the case feels thin.",
            "The sound is good but the battery could last longer.",
            "It does the job, although the instructions are not very clear.",
            "It looks nice on the desk but it is a little slow.",
            "The shoes are comfortable, but the colour is not like the picture.",
        ),
        "good": (
            "It is easy to use and the battery lasts for most of the week.",
            "The picture is clear and the menu is simple to understand.",
            "It arrived on time and works just as described.",
            "The shoes are comfortable and look good with everything.",
            "It is light, strong and fits easily into my bag.",
            "The sound is clear and the price is very fair.",
            "My daughter likes it and plays with it almost every day.",
            "The handle feels solid and it is simple to clean.",
        ),
        "very good": (
            "The battery lasts all week and it charges faster than any other I have owned.",
            "It works perfectly and looks beautiful on my desk.",
            "I love it and would buy it again without a second thought.",
            "The picture is wonderfully sharp and the colours are amazing.",
            "This is the best thing I have bought for my kitchen in years.",
            "The quality is excellent and the customer service was fantastic.",
            "It is so comfortable that I wear it every single day.",
            "My whole family loves it and we use it all the time.",
            "The sound is incredible and I recommend it to everyone.",
            "It is strong, quiet and worth every penny of the price.",
        ),
    },
}

# Short free starts, so that the text is not made of the openings alone.
FREE_STARTS: tuple[str, ...] = (
    "The", "This", "It", "I", "It is", "A", "My", "We", "There is", "You", "With", "One of",
    "Not", "What", "If you", "Even the", "All of the", "This is", "I was", "I love", "I am",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request to the writer; a whole batch of openings shares it."""

    domain: Domain
    sentiment: Sentiment
    kind: str
    examples: tuple[str, ...]

    def messages(self) -> list[dict[str, str]]:
        """Return the chat turns: the examples as earlier answers, then the same question."""
        question = (
            f"Write one short plain sentence from a review of a {self.kind} "
            f"by someone who thinks it is {self.sentiment}."
        )
        system = "You write short sentences from reviews, in plain simple English."
        turns = [{"role": "system", "content": system}]
        for example in self.examples:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": example})
        turns.append({"role": "user", "content": question})
        return turns
