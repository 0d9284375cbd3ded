"""Constant traffic on the tiny chat model: seeded streams one after the other, all of a seed the same."""

import threading
import time
from collections.abc import Callable

import openai

WAIT_S = 150.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Look twice a second; fails when ``condition`` does not come true."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.5)


class Traffic:
    """Lanes of one seeded stream after the other; each must be what it was at first."""

    def __init__(self, url: str, *, num_lanes: int, num_tokens: int = 200, pause_s: float = 0.0) -> None:
        """``pause_s`` is between the streams of a lane, to leave processor time to what happens beside them."""
        self.problems: list[str] = []
        self.num_streams = 0
        self._url = url
        self._num_tokens = num_tokens
        self._pause_s = pause_s
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(num_lanes)]

    def _ask(self, seed: int) -> None:
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="unused", max_retries=0, timeout=120) as client:
            expected = None
            while not self._done.wait(self._pause_s):
                try:
                    texts = self._stream(client, seed, self._num_tokens)
                except openai.OpenAIError as error:
                    self.problems.append(repr(error))
                    continue
                self.num_streams += 1
                expected = expected or texts
                if texts != expected:
                    self.problems.append(f"seed {seed}: {expected} became {texts}")

    @staticmethod
    def _stream(client: openai.OpenAI, seed: int, num_tokens: int) -> list[str]:
        texts = ["", ""]
        extra = {"ignore_eos": True, "skip_special_tokens": False}
        asked = {"model": "tiny", "prompt": [40, 41, 200 + seed], "max_tokens": num_tokens, "seed": seed, "n": 2}
        for chunk in client.completions.create(**asked, stream=True, extra_body=extra):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        return texts

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        self.wait_for(len(self._threads))
        return self

    def wait_for(self, more: int) -> None:
        """Until so many more streams have ended."""
        wanted = self.num_streams + more
        wait_until(lambda: self.num_streams >= wanted, "streams")

    def __exit__(self, *error: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
