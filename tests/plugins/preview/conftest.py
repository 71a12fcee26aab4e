"""A small run with everything odd in it, and a headless Chromium driven through its own pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a config over the given sources (name -> records) and return its path."""

    def write(
        sources: dict[str, list[Any]], *, tokenize: dict[str, Any] | None = None, **changes: Any
    ) -> Path:
        datasets = []
        for name, records in sources.items():
            file = tmp_path / f"{name}.jsonl"
            lines = [
                r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records
            ]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            tokenize_fn: dict[str, Any] = {"class_name": "ChatTokenizeFn", "max_length": 400}
            if all(isinstance(record, dict) and "text" in record for record in records):
                tokenize_fn["class_name"] = "TextTokenizeFn"
            else:
                tokenize_fn |= tokenize or {}
            dataset = {
                "class_name": "JsonlDataset",
                "name": name,
                "anno_path": str(file),
                "on_bad_record": "skip",
            }
            datasets.append({"dataset": dataset, "tokenize_fn": tokenize_fn})
        config = {
            "work_dir": str(tmp_path / "work"),
            "tokenizer": {"class_name": "ByteTokenizer"},
            "model": {
                "class_name": "Qwen3",
                "vocab_size": 288,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "head_dim": 16,
            },
            "datasets": datasets,
            "dataloader": {"pack_max_length": 512},
            "global_batch_size": 2,
            "epoch_num": 2,
            **changes,
        }
        path = tmp_path / "run.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return path

    return write


class Chromium:
    """A page in headless Chromium, driven by the DevTools protocol over a pipe (no port, no network)."""

    def __init__(self, binary: str, profile: Path) -> None:
        to_browser, self._send = os.pipe()
        self._receive, from_browser = os.pipe()

        def place_pipes() -> None:
            # The protocol reads descriptor 3 and writes 4; copies first, as either may be taken.
            source, target = os.dup(to_browser), os.dup(from_browser)
            os.dup2(source, 3)
            os.dup2(target, 4)

        self._process = subprocess.Popen(
            [
                binary,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            preexec_fn=place_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its result; events that come meanwhile are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._read(60)).get("id") != self._last_id:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file and wait until it has loaded."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.as_uri())
        while not self.happened("Page.loadEventFired"):
            self.events.append(self._read(60))

    def happened(self, method: str) -> list[dict[str, Any]]:
        """Parameters of the events of that name since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, such as `Tab` or `j`."""
        more = {"text": key} if len(key) == 1 else {}
        codes = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "Escape": 27}
        code = codes.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                **(more if kind == "keyDown" else {}),
            )

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Write a PNG of what is seen, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))

    def print_pdf(self) -> bytes:
        """The page as it prints."""
        answer = self.call("Page.printToPDF", printBackground=False)
        return base64.b64decode(answer["data"])

    def close(self) -> None:
        """End the browser."""
        for pipe in (self._send, self._receive):
            os.close(pipe)
        self._process.kill()
        self._process.wait()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], max(0, end - time.monotonic()))
            assert ready, "Chromium did not answer"
            part = os.read(self._receive, 1 << 20)
            assert part, "Chromium ended"
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((found for name in names if (found := shutil.which(name))), None)
    if binary is None:
        pytest.skip("no Chromium on this machine")
    browser = Chromium(binary, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
