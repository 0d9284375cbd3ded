"""Which tokens may come next: a grammar and the tokens emitted so far enter, one boolean per vocabulary entry leaves.

The library is llguidance: an Earley parser over a lexer of derivatives, walked along the tokenizer's trie. What it
keeps of a sequence is a function of the emitted tokens alone, so a constrained sequence resumes like any other. It is
imported with the first constrained request.

Masks are computed on a thread of their own, which holds no interpreter lock meanwhile: the mask of the next token
begins when a token has been chosen, and is usually there before the logits of the next step are.

What a grammar may cost is limited three times: by the library's own limits, by the processor time of compiling it
(``deployments.runtime.grammar_check``, before it is admitted), and by the processor time of all its masks, here.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deployments.messages import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_GRAMMAR_BYTES = 64 * 1024
MASK_BURST_S = 1.0
MASK_TOKEN_S = 0.005
MASK_TIMEOUT_S = 20.0
MAX_LEXER_STATES = 50_000
_MAX_CACHED = 64
# One run of white space between the parts of a JSON value. Without a bound, a model can write line breaks for ever.
_WHITE_SPACE = r"[ \t]|\n[ \t]{0,32}"
_LIBRARY_REMEDY = "Enable 'coerce_one_of' option to approximate oneOf with anyOf"

Mask = NDArray[np.bool_]


class GrammarError(Exception):
    """A grammar cannot be used, or not any further; says why in words for the client."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer and computes their masks, both on one thread; keeps those used last."""

    def __init__(self, tokenizer_file: Path) -> None:
        """``tokenizer_file`` is a ``tokenizer.json``; it is read when the first grammar comes."""
        self._tokenizer_file = tokenizer_file
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._thread = _new_thread()
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], Mask]) -> "Future[Mask]":
        """Compute a mask as soon as the thread is free."""
        return self._thread.submit(work)

    def abandon_thread(self) -> None:
        """Leave the thread to what it hangs in, and let a new one do the rest."""
        self._thread.shutdown(wait=False, cancel_futures=False)
        self._thread = _new_thread()

    def compile(self, grammar: Grammar, *, anew: bool = False) -> "LLMatcher":
        """A matcher at the beginning of ``grammar``; GrammarError where the grammar or the tokenizer will not do.

        Copies of a matcher share what has been found out about its tokens, and the limit on how much that may be;
        ``anew`` shares with nobody that began before.
        """
        with self._lock:
            matcher = None if anew else self._compiled.get(grammar)
        if matcher is None:
            matcher = self.compile_alone(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()

    def load_tokenizer(self, end_token_ids: Sequence[int]) -> "LLTokenizer":
        """The tokenizer, read when first asked for; GrammarError where it will not do."""
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self._tokenizer_file, end_token_ids)
        return self._tokenizer

    def compile_alone(self, grammar: Grammar) -> "LLMatcher":
        """A matcher that shares nothing; GrammarError where the grammar or the tokenizer will not do."""
        from llguidance import LLMatcher  # noqa: PLC0415 - loaded with the first constrained request

        tokenizer = self.load_tokenizer(grammar.end_token_ids)
        matcher = LLMatcher(tokenizer, _translate(grammar), log_level=0, limits=_limits())
        _check(matcher)
        return matcher


class EndRules:
    """When one sequence may end, beside what its grammar says.

    ``end_token_ids`` end a text; they are never part of it. None of them, nor ``stop_token_ids``, may come before
    ``min_tokens`` unless the grammar allows nothing else, and with ``ignore_eos`` only then.
    """

    def __init__(
        self, end_token_ids: Collection[int], stop_token_ids: Collection[int], min_tokens: int, *, ignore_eos: bool
    ) -> None:
        self.end_token_ids = frozenset(end_token_ids)
        self._ends = np.array(sorted(end_token_ids), dtype=np.int64)
        self._stops = np.array(sorted(set(stop_token_ids) - self.end_token_ids), dtype=np.int64)
        self._min_tokens = min_tokens
        self._ignore_eos = ignore_eos

    def apply(self, allowed: Mask, num_emitted: int) -> Mask:
        """Decide over ends in place; GrammarError where nothing is left."""
        may_end = bool(allowed[self._ends].any())
        allowed[self._ends] = False
        is_early = num_emitted < self._min_tokens
        if is_early and len(self._stops):
            stops = self._stops[self._stops < len(allowed)]
            held, allowed[stops] = allowed[stops], False
            if not allowed.any():
                allowed[stops] = held
        must_end = not allowed.any()
        if must_end and not may_end:
            raise GrammarError("no token of this model can continue what the grammar asks for")
        if must_end or (may_end and not is_early and not self._ignore_eos):
            allowed[self._ends] = True
        return allowed


class Constraint:
    """One sequence under one grammar. Not thread-safe: ``mask``, then ``accept``, in turns."""

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar, emitted: Sequence[int], rules: EndRules) -> None:
        self._compiler = compiler
        self._grammar = grammar
        self._emitted = list(emitted)
        self._rules = rules
        self._matcher: LLMatcher | None = None
        self.num_masks = 0
        """Computed so far."""
        self.spent_s = 0.0
        """Processor time of all masks but the first, which compiles."""
        self.waited_s = 0.0
        """How long the sampler has waited for masks."""
        self._ended = False
        self._pending = compiler.submit(self.compute)

    def mask(self) -> Mask:
        """Which tokens may come next, at least one; waits for the thread. GrammarError says why there is no mask."""
        begin_s = time.perf_counter()
        try:
            return self._pending.result(MASK_TIMEOUT_S)
        except TimeoutError as error:
            self._compiler.abandon_thread()
            raise GrammarError(f"the grammar took more than {MASK_TIMEOUT_S:g} s for one token") from error
        finally:
            self.waited_s += time.perf_counter() - begin_s

    def accept(self, token_id: int) -> bool:
        """Take the chosen token, and begin the next mask; True when nothing can follow it.

        A step that was sent before the end was known may bring one more token; it is ignored.
        """
        if not self._ended:
            self._emitted.append(token_id)
            self._ended = token_id in self._rules.end_token_ids or self._is_complete_with(token_id)
            if not self._ended:
                self._pending = self._compiler.submit(self.compute)
        return self._ended

    def _is_complete_with(self, token_id: int) -> bool:
        """Advance the matcher; a token that it does not take is found out about with the next mask."""
        matcher = self._matcher
        assert matcher is not None, "a token is chosen only after a mask; this is a bug"
        return bool(matcher.consume_token(token_id) and matcher.is_stopped() and matcher.is_accepting())

    def compute(self) -> Mask:
        """The next mask. Tried once more with a matcher of its own: a shared one may have run into its limits."""
        begin_s = time.thread_time()
        try:
            if self._matcher is None:
                self._matcher = self._replay(anew=False)
            bits = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                self._matcher = self._replay(anew=True)
                bits = self._matcher.compute_bitmask()
                _check(self._matcher)
            allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").view(np.bool_)
            return self._rules.apply(allowed, len(self._emitted))
        finally:
            self._pay(time.thread_time() - begin_s)

    def _replay(self, *, anew: bool) -> "LLMatcher":
        matcher = self._compiler.compile(self._grammar, anew=anew)
        if self._emitted and not matcher.consume_tokens(self._emitted) and anew:
            _check(matcher)
        return matcher

    def _pay(self, seconds: float) -> None:
        self.num_masks += 1
        if self.num_masks > 1:  # the first one compiles, and was paid for at admission
            self.spent_s += seconds
        if self.spent_s > MASK_BURST_S + MASK_TOKEN_S * self.num_masks:
            raise GrammarError(
                f"the grammar took {self.spent_s:.1f} s of computing for {self.num_masks} tokens, more than "
                f"{MASK_BURST_S:g} s and {MASK_TOKEN_S * 1e3:g} ms a token; write one that is less ambiguous"
            )


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="grammar")


def _load_tokenizer(file: Path, end_token_ids: Sequence[int]) -> "LLTokenizer":
    from llguidance import LLTokenizer  # noqa: PLC0415 - loaded with the first constrained request

    if not end_token_ids:
        raise GrammarError("this model has no token that ends a text, so its output cannot be constrained")
    if not file.is_file():
        raise GrammarError("this model has no tokenizer.json, so its output cannot be constrained")
    try:
        return LLTokenizer(str(file), eos_token=list(end_token_ids))
    except ValueError as error:
        raise GrammarError(f"this model's tokenizer cannot be constrained: {error}") from error


def _translate(grammar: Grammar) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415 - loaded with the first constrained request

    if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"it has {len(grammar.text.encode())} bytes; at most {MAX_GRAMMAR_BYTES} are allowed")
    match grammar.kind:
        case "json_schema":
            options = schema_options(lenient=grammar.lenient)
            return LLMatcher.grammar_from_json_schema(grammar.text, overrides=options)  # type: ignore[arg-type]
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def schema_options(*, lenient: bool) -> dict[str, Any]:
    """The library's options for one schema, whatever the schema itself says about them."""
    return {
        "whitespace_pattern": _WHITE_SPACE,
        "whitespace_flexible": True,
        "lenient": lenient,
        "coerce_one_of": lenient,  # to anyOf, where branches may overlap
    }


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits  # noqa: PLC0415 - loaded with the first constrained request

    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _check(matcher: "LLMatcher") -> None:
    """Raise what the library has against a grammar, in its first lines: more would repeat the grammar."""
    if matcher.is_error():
        reason = matcher.get_error().split("<non-verbose/>")[0].replace(_LIBRARY_REMEDY, "Write anyOf.").strip()
        raise GrammarError(reason or str(matcher.stop_reason()))
