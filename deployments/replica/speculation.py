"""Tokens so far enter, guesses at the next ones leave: what came after them the last time the text went like this.

Prompt lookup decoding (Saxena 2023; "n-gram speculation" elsewhere): no second model drafts, the text itself does.
One step of the stages then checks several drafts for little more than the price of one token, because reading the
weights is what a small step costs (speculative decoding: Leviathan, Kalman and Matias, arXiv:2211.17192).

A token is a function of the tokens before it, the seed, the choice and the position, so checking is comparing: what
is chosen after each draft is what would have been chosen without any, and a draft counts when it is that token.
"""

from collections.abc import Sequence

_NGRAM_TOKENS = 3
_MIN_RIGHT = 2  # guesses right in a row; after a single one most are wrong
_MAX_PROMPT_TOKENS = 4096  # the last ones; remembering one takes about 200 bytes


class NgramDrafter:
    """Follows one sequence, and drafts while it repeats itself or its prompt."""

    def __init__(self) -> None:
        self._position_after: dict[tuple[int, ...], int] = {}
        """Of the token that came after an n-gram the last time."""
        self._num_read = 0
        self._num_right = 0

    @property
    def is_confident(self) -> bool:
        """Whether the last tokens read could have been guessed."""
        return self._num_right >= _MIN_RIGHT

    def read(self, tokens: Sequence[int]) -> None:
        """Take in what is new of ``tokens``, which only ever grow; the first time, that is the end of the prompt."""
        if self._num_read == 0:
            first = max(0, len(tokens) - _MAX_PROMPT_TOKENS)
            ngrams = zip(*(tokens[first + start :] for start in range(_NGRAM_TOKENS)), strict=False)
            self._position_after.update(zip(ngrams, range(first + _NGRAM_TOKENS, len(tokens)), strict=False))
        else:
            for position in range(max(self._num_read, _NGRAM_TOKENS), len(tokens)):
                self._read_one(tokens, position)
        self._num_read = len(tokens)

    def _read_one(self, tokens: Sequence[int], position: int) -> None:
        ngram = tuple(tokens[position - _NGRAM_TOKENS : position])
        earlier = self._position_after.get(ngram)
        is_right = earlier is not None and tokens[earlier] == tokens[position]
        self._num_right = self._num_right + 1 if is_right else 0
        self._position_after[ngram] = position

    def draft(self, tokens: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """Guesses at the ``num_tokens`` after ``tokens``, all of which were read; none where the end of them is new.

        A repetition that is still going on is taken to go on.
        """
        after = self._position_after.get(tuple(tokens[-_NGRAM_TOKENS:]))
        if after is None:
            return ()
        drafts: list[int] = []
        for position in range(after, after + num_tokens):
            drafts.append(tokens[position] if position < len(tokens) else drafts[position - len(tokens)])
        return tuple(drafts)
