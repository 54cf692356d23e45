"""Responses of several turns: an environment replies to the policy."""

import dataclasses

import pytest
import torch

from engine.errors import UserInputError
from engine.journal.turns import turns_of
from engine.train.check import check
from engine.train.distributed import compute_on_rank_0
from engine.train.environment.environments import Environments
from engine.train.environment.response import Limits, Response
from engine.train.environment.turn_loop import TurnLoop
from engine.train.evaluation.evaluate import evaluate
from engine.train.experience.generation import generate_rollout, sampling_options
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.ppo.metrics import conversation_metrics, distinct_2
from engine.train.reports.probe import answer_probe
from engine.train.rewards.source import RewardInputs
from engine.train.rollout.backend import generate_responses
from engine.train.rollout.conversation import SampledTurn
from engine.train.rollout.rollout import replace_rows
from engine.train.run import max_response_tokens, max_sequence_tokens
from engine.train.step import train_step
from tests.e2e.lab import OLD_SESSIONS
from tests.train.arithmetic import CHAT
from tests.train.repeating import ENVIRONMENT, SCORED, STOPS, Repeating, conversations, respond
from tests.train.two_ranks import two_ranks


def test_a_response_is_the_turns_of_the_policy_with_replies_between_them(make_run, tokenizer):
    run, _ = make_run(*ENVIRONMENT, STOPS)
    rollout = respond(run)
    question = tokenizer(Repeating.QUESTION, add_special_tokens=False)["input_ids"]
    counts = set()
    for i, (ids, sampled) in enumerate(conversations(rollout)):
        turns = rollout.conversation.turns[i]
        counts.add(turns.count)
        assert [ids[at] for at in sampled] == rollout.ids[i, : len(sampled)].tolist()
        assert sampled[-1] == len(ids) - 1  # the last turn is the policy's
        replied = [ids[at] for at in range(len(ids)) if at not in sampled]
        assert replied == question * (turns.count - 1)
        roles = [message["role"] for message in turns.messages]
        assert roles == ["assistant", "user"] * (turns.count - 1) + ["assistant"]
        assert [rollout.texts[i][a:b] for a, b in turns.replies] == [Repeating.QUESTION] * (
            turns.count - 1
        )
        assert turns.environment.heard == [m["content"] for m in turns.messages[::2]]
    assert len(counts) > 1, "the responses must differ in their number of turns"


def test_text_needs_no_template_that_shows_replies(make_run):
    """Also if the tokenizer cannot write them: this one knows a few words in lower case."""
    of_few_words = OLD_SESSIONS / "policy"
    run, _ = make_run(*ENVIRONMENT, STOPS, f"model.policy={of_few_words}", "model.value=shared")
    assert respond(run).conversation is not None


def test_recorded_log_probabilities_are_those_of_the_whole_conversation(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS, "model.value=shared")
    rollout = respond(run)
    logprobs, values = score_tokens(run.policy, rollout, 1.0, MicroBatchLimit(3))
    mask = rollout.mask
    assert torch.allclose(logprobs, rollout.logprobs * mask, atol=1e-5)
    assert torch.allclose(values, rollout.values * mask, atol=1e-5)


def test_log_probabilities_are_those_of_a_slow_loop_over_the_tokens(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS)
    rollout = respond(run)
    for i, (ids, sampled) in enumerate(conversations(rollout)):
        prompt = rollout.batch.prompts[i].ids
        with torch.no_grad():
            logits = run.policy.lm(torch.tensor([prompt + ids])).logits[0]
        expected = [float(logits[len(prompt) + at - 1].log_softmax(-1)[ids[at]]) for at in sampled]
        found = rollout.logprobs[i, : len(sampled)].tolist()
        assert found == pytest.approx(expected, abs=1e-4)


def test_an_environment_that_never_replies_leaves_the_tokens_as_they_are(make_run, tmp_path):
    (tmp_path / "silent.py").write_text(
        "class Silent:\n    def reply(self, text):\n        return None\n"
    )
    run, _ = make_run()
    silent, _ = make_run("environment.factory=silent:Silent", f"environment.path={tmp_path}",
                         "environment.max_tokens=8")  # fmt: skip
    expected, found = respond(run), respond(silent)
    width = expected.ids.shape[1]
    assert torch.equal(found.ids[:, :width], expected.ids)
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.ended, expected.ended)
    assert torch.equal(found.logprobs * found.mask, expected.logprobs * expected.mask)
    assert found.texts == expected.texts
    one, _ = train_step(run, 1)
    other, _ = train_step(silent, 1)
    same = {k: v for k, v in other.items() if k in one and not k.startswith(("time/", "perf/"))}
    assert same == {k: one[k] for k in same}


def test_random_numbers_belong_to_the_row_whatever_the_other_responses_do(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS)
    prompts, options = run.prompts.for_step(1), sampling_options(run, 1)
    whole = generate_responses(run.backend, run.policy, prompts, options, run.tokenizer, run.ranks)
    some = dataclasses.replace(options, rows=(5, 2))
    chosen = [prompts[5], prompts[2]]
    part = generate_responses(run.backend, run.policy, chosen, some, run.tokenizer, run.ranks)
    assert part.texts == [whole.texts[5], whole.texts[2]]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_of_turns_truncates_responses_that_would_go_on(make_run, limit):
    run, _ = make_run(*ENVIRONMENT, STOPS, f"environment.max_turns={limit}")
    rollout = respond(run)
    cut = 0
    for i, turns in enumerate(rollout.conversation.turns):
        assert turns.count <= limit
        if turns.count < turns.environment.most_turns:
            cut += 1
            assert not rollout.ended[i]
    assert cut


def test_a_reply_that_does_not_fit_ends_the_response(make_run, tokenizer):
    question = len(tokenizer(Repeating.QUESTION, add_special_tokens=False)["input_ids"])
    run, _ = make_run(*ENVIRONMENT, STOPS, f"environment.max_tokens={2 * question - 1}")
    rollout = respond(run)
    assert max(turns.count for turns in rollout.conversation.turns) == 2
    for i, turns in enumerate(rollout.conversation.turns):
        assert turns.count < turns.environment.most_turns <= 2 or turns.count <= 2
        cut = turns.environment.most_turns == 3 and turns.count == 2
        assert turns.reply_left_out == cut
        if cut:
            assert not rollout.ended[i]
    metrics = conversation_metrics(rollout.conversation, rollout)
    left_out = [turns.reply_left_out for turns in rollout.conversation.turns]
    assert 0 < metrics["environment/left_out_replies"] == sum(left_out) / len(left_out)


def test_the_policy_samples_no_more_tokens_in_all_turns_than_in_one(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS, "rollout.max_new_tokens=4")
    rollout = respond(run)
    assert int(rollout.lengths.max()) <= 4
    assert rollout.ids.shape[1] <= 4


def test_no_turn_is_longer_than_what_is_left_of_its_response(make_run):
    """A longer one would leave the positions of the model, or the length of a vLLM engine."""
    run, _ = make_run(*ENVIRONMENT, STOPS, "rollout.max_new_tokens=6")
    asked = []

    def generate(prompts, options):
        asked.append((prompts, options))
        return generate_responses(
            run.backend, run.policy, prompts, options, run.tokenizer, run.ranks
        )

    options = sampling_options(run, 1)
    rollout = TurnLoop(run.config, run.environments, run.tokenizer, options, "step 1").generate(
        run.prompts.for_step(1), generate
    )
    question = 4  # tokens
    for number, (prompts, turn) in enumerate(asked[1:], start=1):
        assert turn.max_new_tokens == max(turn.limits)
        for prompt, row, limit in zip(prompts, turn.rows, turn.limits, strict=True):
            sampled = len(prompt.ids) - len(rollout.batch.prompts[row].ids) - number * question
            assert limit == 6 - sampled > 0


def test_a_step_trains_on_the_scores_of_environments(make_run):
    run, _ = make_run(*ENVIRONMENT, *SCORED, STOPS)
    before = [p.clone() for p in run.policy.parameters()]
    metrics, samples = train_step(run, 1)
    assert 1 < metrics["environment/turns"] < 3
    assert metrics["environment/reply_tokens"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, run.policy.parameters(), strict=True))
    assert samples[0].score == pytest.approx(
        sum(len(m) for m in samples[0].response.split(Repeating.QUESTION)) / 10
    )


def test_the_replies_do_not_count_as_repetitions_of_the_policy(make_run):
    run, _ = make_run(*ENVIRONMENT, *SCORED, STOPS, "eval={every: 1, holdout: 4}")
    rollout = respond(run)
    turns = [m["content"] for found in rollout.conversation.turns for m in found.messages[::2]]
    assert any(Repeating.QUESTION in text for text in rollout.texts)
    metrics, _ = train_step(run, 1)
    assert metrics["text/distinct_2"] == distinct_2(turns) != distinct_2(rollout.texts)
    held_out = evaluate(run, run.held_out, 1)
    assert held_out.metrics["eval/distinct_2"] != distinct_2([s.response for s in held_out.samples])


def test_an_environment_gets_special_tokens_but_not_the_one_that_ends_the_turn(make_run, tokenizer):
    run, _ = make_run(*ENVIRONMENT)
    ids = [*tokenizer(" good")["input_ids"], tokenizer.bos_token_id or tokenizer.eos_token_id, 7]
    for ended in (False, True):
        given = [*ids, tokenizer.eos_token_id] if ended else ids
        turn = SampledTurn(0, given, torch.zeros(3, len(given)), ended, ended=True, version=0)
        limits = Limits(turns=2, tokens=10, reply_tokens=10)
        response = Response(run.prompts.for_step(1)[0], None, limits)
        response.add_turn(turn, tokenizer)
        assert response.last_turn == tokenizer.decode(ids)
        assert response.messages == [
            {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        ]


def test_without_tools_an_environment_gets_a_turn_that_is_written_like_a_call(make_run):
    run, _ = make_run(*ENVIRONMENT)
    call = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    (environment,) = run.environments.make(run.prompts.for_step(1)[:1], [2], "step 1", lambda: None)
    (answer,) = run.environments.answers(
        [environment], [call], "step 1", 1, lambda: None, lambda _i, _messages: []
    )
    assert environment.heard == [call]
    assert [message["content"] for message in answer.messages] == [Repeating.QUESTION]


def test_a_reward_function_gets_the_environments(make_run, tmp_path):
    (tmp_path / "counting.py").write_text(
        "def count(environments, completions):\n"
        "    assert len(environments) == len(completions)\n"
        "    return [e.turns() for e in environments]\n"
    )
    function = ("reward.model=null", "reward.function=counting:count", f"reward.path={tmp_path}")
    run, _ = make_run(*ENVIRONMENT, STOPS, *function)
    rollout = respond(run)
    scores = run.rewards(RewardInputs.of(rollout, 1)).total
    assert scores.tolist() == [turns.count for turns in rollout.conversation.turns]


def test_a_reward_function_of_a_chat_gets_the_messages_of_both(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS)
    inputs = RewardInputs.of(respond(run), 1)
    row = next(i for i, turns in enumerate(inputs.turns) if turns.count > 1)
    assert [m["role"] for m in inputs.messages(row)][:3] == ["assistant", "user", "assistant"]
    (part,) = inputs.select(torch.tensor([row])).turns
    assert part is inputs.turns[row]
    assert inputs.messages(row) is not inputs.turns[row].messages  # the function may change them


@pytest.mark.parametrize("chat", [False, True])
def test_a_judge_reads_the_turns_without_the_markup_between_them(make_run, chat):
    # Not a special token, which no text of a response has.
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    as_chat = (f"data.chat_template='{template}'", "data.chat=true") if chat else ()
    run, _ = make_run(*ENVIRONMENT, STOPS, *as_chat)
    inputs = RewardInputs.of(respond(run), 1)
    assert max(turns.count for turns in inputs.turns) > 1
    for i, turns in enumerate(inputs.turns):
        first, *others = [message["content"] for message in turns.messages]
        if not chat:
            assert inputs.plain(i) == inputs.texts[i]
        elif not others:
            assert inputs.plain(i) == first
        else:
            text = inputs.plain(i)
            assert text.startswith(f"assistant: {first}\n\nuser: {Repeating.QUESTION}")
            assert "[assistant]" not in text


def test_a_reward_model_reads_the_tokens_of_the_whole_conversation(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS)
    inputs = RewardInputs.of(respond(run), 1)
    scores = run.rewards(inputs).total
    joined = dataclasses.replace(inputs, ids=[ids[:] for ids in inputs.ids], turns=None)
    assert run.rewards(joined).total.tolist() == scores.tolist()
    for ids, turns in zip(inputs.ids, inputs.turns, strict=True):
        assert len(ids) >= turns.count + len(turns.replies)


def test_dynamic_sampling_replaces_whole_conversations(make_run):
    run, _ = make_run(*ENVIRONMENT, *SCORED, STOPS)
    first, other = respond(run, 1), respond(run, 2)
    rows = torch.tensor([0, 3])
    mixed = replace_rows(first, rows, other, torch.tensor([2, 1]))
    expected, given = list(conversations(first)), list(conversations(other))
    expected[0], expected[3] = given[2], given[1]
    assert list(conversations(mixed)) == expected
    assert mixed.conversation.turns[3] is other.conversation.turns[1]
    length = int(mixed.host_lengths[:, 3].sum())
    sequence = mixed.sequences(torch.tensor([3]), length)[0].tolist()
    assert sequence == other.batch.prompts[1].ids + given[1][0]


def test_a_rank_that_waits_for_environments_says_so_after_each_of_them(make_run):
    """Otherwise it would be taken for one that hangs."""
    run, _ = make_run(*ENVIRONMENT, STOPS)
    done = []
    rollout = generate_rollout(run, 1, lambda *progress: done.append(progress))
    heard = [len(turns.environment.heard) for turns in rollout.conversation.turns]
    assert sum(now == total for now, total in done) >= len(heard) + sum(heard)


def test_the_other_ranks_are_not_silent_while_rank_0_waits_for_environments(make_run, monkeypatch):
    monkeypatch.setattr(compute_on_rank_0, "WAITING_INTERVAL", 0.0)
    run, _ = make_run(*ENVIRONMENT, STOPS)
    prompts = run.prompts.for_step(1)
    *ranks, sent = two_ranks()
    reports = []
    for rank in ranks:
        calls = []
        environments = Environments(run.config, rank)
        environments.make(prompts, list(range(len(prompts))), "step 1", lambda c=calls: c.append(1))
        reports.append(len(calls))
    assert reports[1] == reports[0] >= len(prompts)
    assert not sent


def test_an_evaluation_has_conversations_too(make_run):
    run, _ = make_run(*ENVIRONMENT, *SCORED, STOPS, "eval={every: 1, holdout: 4}")
    found = evaluate(run, run.held_out, 1)
    assert any(Repeating.QUESTION in sample.response for sample in found.samples)
    again = evaluate(run, run.held_out, 1)
    assert again.metrics["eval/score"] == found.metrics["eval/score"]


def test_a_probe_is_a_conversation_with_an_environment_which_scores_it(make_run):
    run, _ = make_run(*ENVIRONMENT, *SCORED, STOPS)
    found = answer_probe(run, run.prompts.for_step(1)[0].text)
    assert found["policy"] == found["reference"]
    assert found["policy"]["replies"]
    text = found["policy"]["response"]
    turns = [turn.text for turn in turns_of(text, found["policy"]["replies"])]
    assert turns[1::2] == [Repeating.QUESTION] * (len(turns) // 2)
    assert found["policy"]["score"] == pytest.approx(sum(map(len, turns[::2])) / 10)
    assert found["policy"]["kl"] == pytest.approx(0, abs=1e-4)
    assert found == answer_probe(run, run.prompts.for_step(1)[0].text)


def test_positions_for_the_replies_are_kept_free(make_run):
    with pytest.raises(UserInputError, match=r"environment\.max_tokens"):
        make_run(*ENVIRONMENT, "environment.max_tokens=250")
    message = (
        r"rollout\.max_new_tokens \(250\) must be at most \d+: the models have no more positions "
        r"after the longest prompt \(\d+ tokens\) and environment\.max_tokens \(40\); for more, "
        r"lower environment\.max_tokens, or data\.max_prompt_tokens to leave out long prompts"
    )
    with pytest.raises(UserInputError, match=message):
        make_run(*ENVIRONMENT, "rollout.max_new_tokens=250")
    run, _ = make_run(*ENVIRONMENT)
    longest = run.prompts.longest
    assert max_response_tokens(run) == max_sequence_tokens(run) - longest - 40


def test_samples_tell_where_the_replies_are(make_run):
    run, _ = make_run(
        *ENVIRONMENT, *SCORED, STOPS, "eval={every: 1, holdout: 4}", "log={samples: 8, arrays: 8}"
    )
    rollout = respond(run)
    _, samples = train_step(run, 1)
    assert max(len(sample.replies) for sample in samples) == 2
    conversation = rollout.conversation
    for i, sample in enumerate(samples):
        assert sample.replies == conversation.turns[i].replies
        places = conversation.positions[i, : sample.length].tolist()
        gaps = [k for k in range(1, len(places)) if places[k] != places[k - 1] + 1]
        assert sample.arrays.before_replies == gaps
    held_out = evaluate(run, run.held_out, 1).samples
    for sample in held_out:
        texts = [sample.response[a:b] for a, b in sample.replies]
        assert texts == [Repeating.QUESTION] * len(texts)
    assert any(sample.replies for sample in held_out)


def test_samples_of_conversations_have_their_messages(make_run):
    run, _ = make_run(
        *ENVIRONMENT, *SCORED, STOPS, f"data.chat_template='{CHAT}'", "data.chat=true",
        "environment.max_tokens=120",
    )  # fmt: skip
    rollout = respond(run)
    _, samples = train_step(run, 1)
    for sample, prompt, turns in zip(
        samples, rollout.batch.prompts, rollout.conversation.turns, strict=False
    ):
        assert sample.messages.prompt == prompt.messages
        assert sample.messages.response == turns.messages
    found = answer_probe(run, "Hello")["policy"]["messages"]
    assert found["prompt"] == [{"role": "user", "content": "Hello"}]
    assert [m["role"] for m in found["response"]][:2] in (["assistant"], ["assistant", "user"])


def test_check_tells_where_the_replies_are_and_counts_turns(make_run):
    run, _ = make_run(*ENVIRONMENT, *SCORED, STOPS)
    result = check(run.config)
    found = result.samples
    assert result.turns == sum(1 + len(sample.replies) for sample in found) / len(found)
    assert result.tool_calls is None
    texts = [s.response[a:b] for s in found for a, b in s.replies]
    assert texts == [Repeating.QUESTION] * len(texts)
    assert len(found) == 2


def test_check_tells_that_replies_do_not_fit(make_run):
    run, _ = make_run(*ENVIRONMENT, *SCORED, STOPS, "environment.max_tokens=1")
    (warning,) = [text for text in check(run.config).warnings if "max_tokens" in text]
    assert "ended because a reply did not fit into environment.max_tokens (1)" in warning


def test_samples_without_an_environment_have_no_replies(make_run):
    run, _ = make_run()
    _, samples = train_step(run, 1)
    assert {sample.replies for sample in samples} == {None}
    assert {sample.messages for sample in samples} == {None}
    assert samples[0].arrays.before_replies == []
