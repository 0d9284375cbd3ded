"""A process that compiles grammars nobody has tried before, so that only it dies of a bad one.

    python -m deployments.runtime.grammar_check TOKENIZER_JSON

One grammar a line comes in (JSON), one verdict a line goes out: ``{"reason": null}``, or why it will not do. A
grammar may nest deeper than a stack, or take hours to compile. The system ends this process then, by the limits set
here; whoever asked sees that, and starts another. It ends with its standard input.
"""

import resource
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np

from deployments.messages import Grammar
from deployments.runtime.grammar import GrammarCompiler, GrammarError

COMPILE_LIMIT_S = 0.5
"""Processor time of compiling a grammar and of its first mask: what a step of others may have to wait for it."""
MEMORY_LIMIT_BYTES = 512 * 2**20
"""Beyond what the tokenizer takes."""
_KILL_AFTER_S = 2  # whole seconds: the system's clock for this is no finer
_STACK_BYTES = 2**20  # an eighth of what a stage's threads have
_MAX_REASON_CHARACTERS = 400


class Verdict(msgspec.Struct, frozen=True):
    """Why a grammar is refused; None when it is not."""

    reason: str | None


def judge(compiler: GrammarCompiler, grammar: Grammar) -> Verdict:
    """Compile ``grammar`` and compute its first mask."""
    begin_s = time.thread_time()
    try:
        matcher = compiler.compile_alone(grammar)
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    except GrammarError as error:
        return Verdict(str(error)[:_MAX_REASON_CHARACTERS])
    if matcher.is_error() or not mask.any():
        return Verdict("no text fits it, or none that this model can begin")
    seconds = time.thread_time() - begin_s
    if seconds > COMPILE_LIMIT_S:
        return Verdict(f"it takes {seconds:.1f} s to compile; at most {COMPILE_LIMIT_S:g} s are allowed; simplify it")
    return Verdict(None)


def serve(tokenizer_file: Path) -> None:
    """Answer until standard input ends."""
    compiler = GrammarCompiler(tokenizer_file)
    is_limited = False
    for line in sys.stdin.buffer:
        grammar = msgspec.json.decode(line, type=Grammar)
        if not is_limited:
            compiler.load_tokenizer(grammar.end_token_ids)
            _limit_memory()
            is_limited = True
        _limit_time()
        sys.stdout.buffer.write(msgspec.json.encode(judge(compiler, grammar)) + b"\n")
        sys.stdout.buffer.flush()


def _limit_time() -> None:
    used_s = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(used_s) + _KILL_AFTER_S, resource.RLIM_INFINITY))


def _limit_memory() -> None:
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = num_pages * resource.getpagesize() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def main() -> None:
    """Serve on a thread with a stack smaller than those that will use the grammars."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    server = threading.Thread(target=serve, args=(Path(sys.argv[1]),))
    server.start()
    server.join()


if __name__ == "__main__":
    main()
