"""In a real browser the page runs without an error or a request, and works by mouse and by keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard_plugins.preview.gathering import gather_preview
from pegboard_plugins.preview.page import render_page

ATTACK = "</script><script>window.owned=1</script><img src=x onerror='window.owned=2'><svg onload=owned=3>"


def write_page(path: Path, tmp_path: Path, **fields: Any) -> Path:
    run = load_run_config(path, (), load_plugins(third_party=False).registry).run
    preview = gather_preview(run, config_path=ATTACK, step=1, num_shown=4)
    file = tmp_path / "page.html"
    file.write_text(render_page(preview, **fields), encoding="utf-8")
    return file


@pytest.fixture
def page(write_run: Callable[..., Path], tmp_path: Path) -> Path:
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{ATTACK} {k}"},
                {"role": "assistant", "content": f"{ATTACK} \u4f60"},
            ]
        }
        for k in range(12)
    ]
    return write_page(write_run({"a": records}), tmp_path)


def test_nothing_fails_nothing_is_fetched_and_no_data_runs(chromium: Any, page: Path) -> None:
    chromium.open(page)
    assert chromium.evaluate("typeof window.owned") == "undefined"
    requests = {
        event["request"]["url"].split(":")[0]
        for event in chromium.happened("Network.requestWillBeSent")
    }
    assert requests <= {"file", "data"}
    assert chromium.happened("Runtime.exceptionThrown") == []
    errors = [
        e["entry"] for e in chromium.happened("Log.entryAdded") if e["entry"]["level"] == "error"
    ]
    assert errors == []
    # The policy is in force: a script that is added does not run.
    chromium.evaluate(
        "{const s = document.createElement('script'); s.textContent = 'window.owned = 4';"
        "document.body.append(s)}"
    )
    assert chromium.evaluate("typeof window.owned") == "undefined"


def test_pointing_at_a_token_tells_its_id_place_and_position(chromium: Any, page: Path) -> None:
    chromium.open(page)
    chromium.evaluate("document.querySelector('#p0s1').scrollIntoView({block: 'center'})")
    box = chromium.evaluate(
        "(() => { const t = document.querySelectorAll('#p0s1 .tokens > i')[2].getClientRects()[0];"
        "return [t.left + t.width / 2, t.top + t.height / 2] })()"
    )
    chromium.point(*box)
    said = chromium.evaluate("document.getElementById('tip').innerText")
    start = chromium.evaluate("Number(document.querySelector('#p0s1').dataset.start)")
    assert chromium.evaluate("document.getElementById('tip').hidden") is False
    assert f"in the row {start + 2:,}" in said and "position 2" in said
    ids = chromium.evaluate("JSON.parse(document.getElementById('data').textContent)[0].ids")
    assert f"id {ids[start + 2]}" in said
    chromium.point(5, 5)
    assert chromium.evaluate("document.getElementById('tip').hidden") is True


def test_everything_is_reached_by_keys(chromium: Any, page: Path) -> None:
    chromium.open(page)
    chromium.press("Tab")
    assert chromium.evaluate("document.activeElement.className") == "skip"
    chromium.press("j")
    chromium.press("j")
    assert chromium.evaluate("document.activeElement.className").startswith("sample")
    chromium.press("k")
    chromium.press("Tab")
    assert chromium.evaluate("document.activeElement.className") == "tokens"
    first = chromium.evaluate("document.getElementById('tip').innerText")
    chromium.press("ArrowRight")
    second = chromium.evaluate("document.getElementById('tip').innerText")
    assert first and second and first != second
    chromium.press("Escape")
    assert chromium.evaluate("document.getElementById('tip').hidden") is True


@pytest.mark.parametrize("width", [380, 800, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_never_scrolls_sideways(chromium: Any, page: Path, width: int, dark: bool) -> None:
    chromium.open(page, width=width, dark=dark)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_packs_of_16k_tokens_stay_quick(
    chromium: Any, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    records = [{"text": "some longer text \u4f60 \n" * 180} for _ in range(20)]
    path = write_run({"a": records}, dataloader={"pack_max_length": 16384})
    config = path.read_text().replace(
        '"TextTokenizeFn", "max_length": 400', '"TextTokenizeFn", "max_length": 16384'
    )
    path.write_text(config)
    file = write_page(path, tmp_path)
    assert file.stat().st_size < 8 << 20
    chromium.open(file)
    assert chromium.evaluate("document.querySelectorAll('.tokens > i').length") > 16384
    took = chromium.evaluate(
        "(() => { const t = performance.now(); for (let k = 0; k < 20; k++) {"
        "scrollTo(0, k * 3000); document.body.offsetHeight } return performance.now() - t })()"
    )
    assert took < 5000  # far above what it takes: a page that hangs takes minutes


def test_it_prints(chromium: Any, page: Path) -> None:
    chromium.open(page)
    assert chromium.print_pdf().startswith(b"%PDF")
