"""The order of a run's prompts, which depends on the seed and the step only."""

import itertools
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.errors import UserInputError
from engine.train.data.mixture import Mixture
from engine.train.data.prompt_table import PromptTable
from engine.train.data.prompts import Prompt
from engine.train.data.randomness import permutation

SAME_TEXT = "with the text of a held-out one"
"""The reason for which :meth:`Prompts.hold_out` leaves out prompts that it did not choose."""


class Prompts:
    """All prompts of a run; :meth:`for_step` selects those of a step."""

    def __init__(
        self,
        tables: Sequence[PromptTable],
        *,
        per_step: int,
        shuffle: bool,
        seed: int,
        weights: Sequence[float] | None = None,
        left_out: dict[str, int] | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        """Sets the order.

        Args:
            tables: one for each data set; none is empty.
            per_step: prompts of a step, over all ranks.
            shuffle: whether each pass over a data set has an order of its own.
            seed: determines the order.
            weights: the data sets' shares. Default: they are equal.
            left_out: number of prompts of the data that are not among these, by reason.
            columns: further columns of the rows. A part of the prompts may come from some of the
                data sets only, but has the columns of all.
        """
        self._tables = list(tables)
        self._per_step = per_step
        self._shuffle = shuffle
        self._seed = seed
        self._weights = list(weights or [1.0] * len(self._tables))
        self.left_out = left_out or {}
        """Number of prompts of the data that are not among these, by reason."""
        self._mixture = Mixture(self._weights, seed) if len(self._tables) > 1 else None
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        found = (column for table in self._tables for column in table.columns)
        self._columns = list(dict.fromkeys((*columns, *found)))

    def __len__(self) -> int:
        return sum(map(len, self._tables))

    @cached_property
    def longest(self) -> int:
        """Length of the longest prompt, in tokens."""
        return max(int(table.lengths.max()) for table in self._tables)

    def for_step(self, step: int) -> list[Prompt]:
        """Returns the prompts of a step, counted from 1.

        Steps read the data in passes, each with its own permutation if `data.shuffle` is true. A
        step may span two or more passes. With several data sets, each has its own passes and its
        share of the prompts.
        """
        first = (step - 1) * self._per_step
        return self._take([self._place(first + i) for i in range(self._per_step)])

    def replacements(self, step: int, attempt: int, count: int) -> list[Prompt]:
        """Returns `count` prompts that replace some of a step, for `rollout.dynamic`.

        They are drawn from all the data, by seed, step and attempt. No prompt repeats unless a data
        set has fewer prompts than are drawn from it.
        """
        labels = [0] * count
        if self._mixture is not None:
            labels = self._mixture.redrawn(step, attempt, count)
        orders = [
            itertools.cycle(self._permutation("redraw", (step, attempt), label).tolist())
            for label in range(len(self._tables))
        ]
        return self._take([(label, next(orders[label])) for label in labels])

    def first(self, count: int) -> list[Prompt]:
        """Returns the first prompts in the order of the data; all of them if there are fewer."""
        places = ((n, i) for n, table in enumerate(self._tables) for i in range(len(table)))
        return self._take(list(itertools.islice(places, count)))

    def find(self, text: str) -> Prompt | None:
        """The first prompt with exactly this :attr:`Prompt.text`, or None."""
        for table in self._tables:
            if (found := table.find(text)) is not None:
                return self._completed(found)
        return None

    def hold_out(self, count: int) -> tuple["Prompts", "Prompts"]:
        """Splits off `count` prompts for evaluation; the seed determines which.

        Prompts with the text of a held-out one are removed from the training prompts, too, and
        counted in their :attr:`left_out`.

        Returns:
            The prompts for training, and those that are held out.

        Raises:
            UserInputError: no prompt of a data set would be left for training.
        """
        order = permutation(self._seed, "holdout", (), len(self)).numpy()
        chosen = np.sort(order[:count])
        ends = np.cumsum([len(table) for table in self._tables])
        held = [
            table.select(chosen[(chosen >= end - len(table)) & (chosen < end)] - (end - len(table)))
            for table, end in zip(self._tables, ends, strict=True)
        ]
        texts = pa.chunked_array([c for t in held for c in t.texts.chunks], pa.string())
        rest = [table.select(~table.among(texts)) for table in self._tables]
        if not all(map(len, rest)) or len(chosen) < count:
            raise UserInputError(
                f"eval.holdout ({count}) leaves no prompt of the {len(self)} in data.prompts for "
                "training: lower it, or give eval.prompts"
            )
        training = self._with(rest, self._weights)
        training.left_out = self.left_out | {SAME_TEXT: len(self) - len(chosen) - len(training)}
        return training, self._with([t for t in held if len(t)])

    def without_texts_of(self, other: "Prompts") -> "Prompts | None":
        """Returns the prompts whose text does not occur in `other`; None if there are none."""
        kept = []
        for table in self._tables:
            # Few texts are in both, and the texts of a large data set are not copied.
            both = [t.select(t.among(table.texts)).texts for t in other._tables]
            shared = pa.chunked_array([c for texts in both for c in texts.chunks], pa.string())
            kept.append(table.select(~table.among(shared)))
        kept = [table for table in kept if len(table)]
        return self._with(kept) if kept else None

    def with_columns_of(self, other: "Prompts") -> "Prompts":
        """Returns the same prompts whose rows also have the columns of `other`, as None."""
        return self._with(self._tables, self._weights, columns=[*self._columns, *other._columns])

    def in_steps_of(self, per_step: int) -> "Prompts":
        """Returns the same prompts in the same order, with a different number per step."""
        return self._with(self._tables, self._weights, per_step=per_step)

    def _with(
        self,
        tables: list[PromptTable],
        weights: list[float] | None = None,
        *,
        columns: list[str] | None = None,
        per_step: int | None = None,
    ) -> "Prompts":
        return Prompts(
            tables,
            per_step=per_step or self._per_step,
            shuffle=self._shuffle,
            seed=self._seed,
            weights=weights,
            left_out=self.left_out,
            columns=columns or self._columns,
        )

    def _take(self, places: list[tuple[int, int]]) -> list[Prompt]:
        """Returns the prompts at (data set, index), with one read of each data set."""
        found: list[Prompt | None] = [None] * len(places)
        for number, table in enumerate(self._tables):
            at = [i for i, (label, _) in enumerate(places) if label == number]
            for i, prompt in zip(at, table.take([places[i][1] for i in at]), strict=True):
                found[i] = self._completed(prompt)
        return [p for p in found if p is not None]

    def _completed(self, prompt: Prompt) -> Prompt:
        """Adds the columns of the other data sets to a prompt, with the value None."""
        if not prompt.row or len(prompt.row) == len(self._columns):
            return prompt
        row = {column: prompt.row.get(column) for column in self._columns}
        return Prompt(prompt.ids, prompt.text, row, prompt.messages)

    def _place(self, position: int) -> tuple[int, int]:
        """Returns the data set and the index of a position in the run's order, counted from 0."""
        label, position = (0, position) if self._mixture is None else self._mixture.at(position)
        number, index = divmod(position, len(self._tables[label]))
        if self._shuffle:
            index = int(self._order(label, number)[index])
        return label, index

    def _order(self, label: int, number: int) -> NDArray[np.int64]:
        """Returns the permutation of a pass over a data set; caches the last one of each."""
        cached, order = self._orders.get(label, (-1, np.empty(0, dtype=np.int64)))
        if cached != number:
            order = self._permutation("data", (number,), label)
            self._orders[label] = number, order
        return order

    def _permutation(self, purpose: str, numbers: tuple[int, ...], label: int) -> NDArray[np.int64]:
        """Returns a permutation of a data set; each of several data sets has its own."""
        if self._mixture is not None:
            numbers = (*numbers, label)
        order = permutation(self._seed, purpose, numbers, len(self._tables[label]))
        return np.asarray(order.numpy(), dtype=np.int64)
