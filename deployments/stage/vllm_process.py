"""``python -m deployments.stage.vllm_process``: a stage whose runner is vLLM, in the environment that vLLM is in.

Started by :class:`deployments.stage.vllm_actor.VllmActor`, which writes one JSON object with the settings to its
standard input; then every line there asks it to listen anew, and is answered by a line on standard output. When
standard input ends, so does the process. What vLLM prints goes to standard error.

Needs msgspec, torch and vLLM, and of Manta only the package ``deployments``; not Ray.
"""

import asyncio
import json
import os
import sys
import threading
from typing import TextIO

import msgspec

from deployments.runtime.vllm_runner import VllmRunner, VllmSettings
from deployments.stage.worker import StagePosition, StageWorker

_POSITION = StagePosition(index=0, is_first=True, is_last=True)


def main() -> None:
    """Load, say so, then serve until the actor is gone."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    settings = msgspec.json.decode(sys.stdin.readline(), type=VllmSettings)
    runner = VllmRunner(settings)
    _answer(answers, {"ready": True})
    asyncio.run(_serve(runner, answers))


async def _serve(runner: VllmRunner, answers: TextIO) -> None:
    loop = asyncio.get_running_loop()
    requests: asyncio.Queue[str] = asyncio.Queue()
    threading.Thread(target=_read_requests, args=(loop, requests), daemon=True).start()
    worker: StageWorker | None = None
    serving: asyncio.Task[None] | None = None
    while True:
        host = await requests.get()
        if worker is not None and serving is not None:
            await worker.stop()
            await asyncio.gather(serving, return_exceptions=True)
        runner.forget()
        worker = StageWorker(runner, _POSITION)
        address, secret = await worker.start(host)
        serving = asyncio.create_task(worker.serve())
        serving.add_done_callback(_end_if_failed)
        _answer(answers, {"address": address, "secret": secret.hex()})


def _read_requests(loop: asyncio.AbstractEventLoop, requests: asyncio.Queue[str]) -> None:
    for line in sys.stdin:
        loop.call_soon_threadsafe(requests.put_nowait, line.strip())
    os._exit(0)  # the actor is gone, however it went; a step under way has nobody to answer to


def _end_if_failed(serving: asyncio.Task[None]) -> None:
    """An engine that failed in a step is not asked again: a new process is."""
    error = None if serving.cancelled() else serving.exception()
    if error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        os._exit(1)


def _answer(answers: TextIO, message: dict[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
