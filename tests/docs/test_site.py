"""The documentation builds strictly as a site, asks nothing of other hosts, and a browser finds nothing broken in it.

One page in headless Chromium opens every page of the site in a frame and reports what it finds there.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urldefrag, urlparse

import pytest
from fenced_blocks import ROOT

pytestmark = pytest.mark.slow

DRIVER = """<!doctype html><title>driver</title><body><script>
const pages = PAGES, report = {};
async function visit(page) {
  const frame = document.createElement("iframe");
  frame.style = "width: 1300px; height: 900px";
  await new Promise((loaded) => {
    frame.onload = loaded;
    frame.src = page;
    document.body.append(frame);
  });
  await new Promise((later) => setTimeout(later, 50));
  const inside = frame.contentDocument;
  report[page] = {
    title: inside.title,
    headings: inside.querySelectorAll("article h1").length,
    links: [...inside.querySelectorAll("a[href]")].map((link) => link.href),
    ids: [...inside.querySelectorAll("[id]")].map((item) => item.id),
    broken_pictures: [...inside.images].filter((one) => !one.naturalWidth).map((one) => one.src),
    unknown: [...inside.querySelectorAll("article *")]
      .filter((one) => one instanceof frame.contentWindow.HTMLUnknownElement)
      .map((one) => one.outerHTML.slice(0, 80)),
    text: inside.querySelector("article").innerText.length,
  };
  frame.remove();
}
(async () => {
  for (const page of pages) await visit(page);
  const result = document.createElement("pre");
  result.id = "report";
  result.textContent = JSON.stringify(report);
  document.body.append(result);
})();
</script>"""


class Visit(NamedTuple):
    """What a browser saw of the whole site."""

    pages: dict[str, Any]
    missing: list[str]
    """Paths that were asked for and not there."""
    console: list[str]
    origin: str


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is in the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def visit(site: Path) -> Iterator[Visit]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    (site / "driver.html").write_text(DRIVER.replace("PAGES", json.dumps(pages)))
    missing: list[str] = []

    class Server(SimpleHTTPRequestHandler):
        def send_error(self, code: int, *_: Any, **__: Any) -> None:
            missing.append(f"{code} {self.path}")
            super().send_error(code)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{server.server_port}"
    done = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--virtual-time-budget=600000", "--dump-dom", f"{origin}/driver.html"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    server.shutdown()
    server.server_close()
    (site / "driver.html").unlink()
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    yield Visit(json.loads(html.unescape(found[1])), missing, console, origin)


def test_the_site_is_built_from_every_page_and_no_other_file(site: Path) -> None:
    built = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    built -= {"404.html"}
    pages = {
        str(path.relative_to(ROOT / "docs").with_suffix(".html"))
        for path in (ROOT / "docs").rglob("*.md")
    }
    readmes = {page for page in pages if page.endswith("README.html")}
    pages = (pages - readmes) | {page.replace("README", "index") for page in readmes}
    assert {page for page in built if not page.startswith("source/")} == pages
    assert [path for path in site.rglob("*") if path.suffix in (".py", ".txt")] == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"""(?:src=|<link[^>]*href=|url\(|@import )["']?(https?:)?//[^"')]+""")
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        found = [hit[0] for hit in fetched.finditer(path.read_text(encoding="utf-8"))]
        assert [hit for hit in found if 'rel="canonical"' not in hit] == [], path


def test_every_page_opens_with_a_title_and_text(visit: Visit) -> None:
    assert len(visit.pages) > 40
    for page, seen in visit.pages.items():
        assert "Pegboard" in seen["title"], page
        assert seen["headings"] == 1, page
        assert seen["text"] > (100 if page != "404.html" else 10), page


def test_the_console_is_silent_and_nothing_is_missing(visit: Visit) -> None:
    assert [path for path in visit.missing if "favicon.ico" not in path] == []
    assert visit.console == []
    for page, seen in visit.pages.items():
        assert seen["broken_pictures"] == [], page
        assert seen["unknown"] == [], f"{page}: write it as code, or with &lt;"


def test_every_link_inside_the_site_leads_to_a_page_and_a_place_in_it(visit: Visit) -> None:
    broken = []
    for page, seen in visit.pages.items():
        for link in set(seen["links"]):
            target, anchor = urldefrag(link)
            if not target.startswith(visit.origin):
                assert urlparse(link).scheme in ("http", "https"), f"{page}: {link}"
                continue
            path = urlparse(target).path.lstrip("/") or "index.html"
            if path not in visit.pages and not path.endswith(".css"):
                broken.append(f"{page}: {link}")
            elif anchor and anchor not in visit.pages[path]["ids"]:
                broken.append(f"{page}: {link}")
    assert broken == []
