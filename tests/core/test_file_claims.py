"""A claim is held by one living process; what a dead one held is taken, and nobody waits for it."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from pegboard import file_claims
from pegboard.file_claims import (
    Claims,
    do_once,
    is_alive_here,
    open_claims,
    owner_of_this_process,
)

ELSEWHERE = {"host": "elsewhere", "machine": "another boot", "pid": os.getpid(), "started": "1"}


def claim_of(folder: Path, owner: object) -> Path:
    path = folder / "x.claim"
    path.write_text(owner if isinstance(owner, str) else json.dumps(owner))
    return path


def test_a_claim_is_held_by_one_until_it_is_released(tmp_path: Path) -> None:
    with open_claims(tmp_path) as one, open_claims(tmp_path) as two:
        assert one.take("x")
        assert not two.take("x") and two.take("y")
        owner = two.owner("x")
        assert owner == owner_of_this_process()
        one.release("x")
        assert two.take("x")
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: (Claims(tmp_path).take("x"), os._exit(9)))
    process.start()
    while process.is_alive():
        time.sleep(0.01)
    owner = json.loads((tmp_path / "x.claim").read_text())
    assert owner["pid"] == process.pid and is_alive_here(owner) is False
    with open_claims(tmp_path) as claims:
        assert claims.take("x")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_whose_parent_has_not_noticed_is_dead(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        Claims(tmp_path).take("x")
        os._exit(9)
    while (
        not (tmp_path / "x.claim").exists()
        or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    ):
        time.sleep(0.01)
    try:
        assert is_alive_here(json.loads((tmp_path / "x.claim").read_text())) is False
    finally:
        os.waitpid(pid, 0)


def test_a_process_that_has_a_dead_ones_number_is_not_the_owner(tmp_path: Path) -> None:
    claim_of(tmp_path, {**owner_of_this_process(), "started": "1"})
    with open_claims(tmp_path) as claims:
        assert claims.take("x")


@pytest.mark.parametrize("owner", [ELSEWHERE, "", "{", "[]"])
def test_a_claim_that_cannot_be_judged_here_is_dead_when_it_is_not_renewed(
    owner: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_claims, "_CHECK_S", 0.0)
    monkeypatch.setattr(file_claims, "_STALE_S", 0.3)
    path = claim_of(tmp_path, owner)
    with open_claims(tmp_path) as claims:
        for _ in range(10):  # as long as its owner renews it, it stands
            os.utime(path)
            assert not claims.take("x")
            time.sleep(0.05)
        begin = time.monotonic()
        while not claims.take("x"):
            assert time.monotonic() - begin < 10
            time.sleep(0.02)
        assert time.monotonic() - begin >= 0.2


def test_a_holder_renews_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_claims, "_RENEW_S", 0.05)
    with open_claims(tmp_path) as claims:
        claims.take("x")
        os.utime(tmp_path / "x.claim", (1, 1))
        begin = time.monotonic()
        while (tmp_path / "x.claim").stat().st_mtime < 2:
            assert time.monotonic() - begin < 10
            time.sleep(0.02)


def _count_up(folder: Path) -> None:
    def work() -> None:
        time.sleep(0.2)
        with (folder / "count").open("a") as file:
            file.write("x")

    with open_claims(folder) as claims:
        do_once(claims, "x", (folder / "count").exists, work)
        assert (folder / "count").exists()


def test_of_many_processes_one_does_the_work_and_all_go_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_up, args=(tmp_path,)) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 5
    assert (tmp_path / "count").read_text() == "x"


def test_work_that_failed_is_done_by_the_next(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("x")

    with open_claims(tmp_path) as one, open_claims(tmp_path) as two:
        with pytest.raises(KeyError):
            do_once(one, "x", lambda: False, fail)
        do_once(two, "x", (tmp_path / "done").exists, (tmp_path / "done").touch)


def test_a_file_system_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    with open_claims(tmp_path) as one, open_claims(tmp_path) as two:
        assert one.take("x") and not two.take("x")
