"""Grammars of requests enter, a refusal leaves for those that cannot be used; the trying is done by another process.

Compiling a grammar runs a user's text through a parser and a regular expression compiler. A bad one may take hours,
gigabytes, or the whole process; so a process of its own (:mod:`deployments.runtime.grammar_check`) tries each grammar
first. It is started with the first constrained request and again when a grammar has ended it.
"""

import asyncio
import logging
import os
import signal
import sys
from collections import OrderedDict
from pathlib import Path

import msgspec

from deployments.messages import Grammar, refuse
from deployments.runtime.grammar_check import COMPILE_LIMIT_S, MEMORY_LIMIT_BYTES, Verdict

logger = logging.getLogger(__name__)

_PROGRAM = "deployments.runtime.grammar_check"
_MAX_REMEMBERED = 512
_ANSWER_TIMEOUT_S = 30.0
_RETRY_AFTER_S = 1.0
_decode = msgspec.json.Decoder(Verdict).decode


class GrammarChecker:
    """Judges grammars one at a time, each only once; ``tokenizer_file`` is the model's ``tokenizer.json``."""

    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer_file = tokenizer_file
        self._verdicts: OrderedDict[Grammar, Verdict] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._asking: set[asyncio.Task[Verdict]] = set()

    async def check(self, grammar: Grammar, request_id: str) -> None:
        """Return when ``grammar`` can be used; raises RequestRefused."""
        verdict = self._verdicts.get(grammar)
        if verdict is None:
            asking = asyncio.create_task(self._judge(grammar))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            try:
                # shielded: an exchange that is broken off would leave its answer for the next one
                verdict = await asyncio.shield(asking)
            except TimeoutError as error:
                message = "the grammar could not be checked in time; try again later"
                raise refuse(request_id, "overloaded", message, retry_after_s=_RETRY_AFTER_S) from error
        if verdict.reason is not None:
            message = f"{grammar.param} cannot be used: {verdict.reason}"
            raise refuse(request_id, "invalid_request", message, param=grammar.param)

    async def _judge(self, grammar: Grammar) -> Verdict:
        async with self._lock:
            verdict = self._verdicts.get(grammar)  # another request may have asked meanwhile
            if verdict is None:
                verdict = await self._ask(grammar)
            self._verdicts[grammar] = verdict
            self._verdicts.move_to_end(grammar)
            if len(self._verdicts) > _MAX_REMEMBERED:
                self._verdicts.popitem(last=False)
        return verdict

    async def _ask(self, grammar: Grammar) -> Verdict:
        process = self._process or await self._start()
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                process.stdin.write(msgspec.json.encode(grammar) + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except ConnectionError:
            line = b""
        except BaseException:
            await self._end()
            raise
        if line:
            return _decode(line)
        return Verdict(_cause_of_death(await self._end()))

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            _PROGRAM,
            str(self._tokenizer_file),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    async def _end(self) -> int:
        """Forget the process, dead or alive; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.returncode is None:
            try:
                async with asyncio.timeout(1.0):  # one that has just died needs a moment to be noticed
                    await process.wait()
            except TimeoutError:
                process.kill()
        return await process.wait()

    async def stop(self) -> None:
        """End the process; what is being asked is refused."""
        for asking in tuple(self._asking):
            asking.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        await self._end()


def _cause_of_death(status: int) -> str:
    logger.warning("the grammar checker ended with status %d; the grammar that did it is refused", status)
    if status == -signal.SIGXCPU:
        return f"it takes too long to compile; at most {COMPILE_LIMIT_S:g} s are allowed; simplify it"
    if status in (-signal.SIGSEGV, -signal.SIGBUS):
        return "it is nested too deeply; simplify it"
    if status == -signal.SIGABRT:
        return f"it needs more than {MEMORY_LIMIT_BYTES // 2**20} MiB to compile; simplify it"
    return f"compiling it ended the process that tried (status {status}); simplify it"
