"""Whole runs on a disk that fills up: the error is named, and once space is freed the run ends as if nothing had been.

Three kinds of full: injected at a random call; a small tmpfs, where mounting is allowed; and the kernel's limit on the
size of a file, which works everywhere.
"""

import ctypes
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.experiment.files import Unwritable
from tests.reliability.campaign import attempt, random_event, undisturbed
from tests.reliability.faults import NEEDS_SPACE, Faults
from tests.reliability.subjects import SUBJECTS, Subject, warm_start

CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_REMOUNT = 0x20000, 0x4000, 1 << 18, 32
ROUNDS = 3
KILOBYTES = (8, 56)
BYTES = (600, 8000)


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request) -> Subject:
    return SUBJECTS[request.param]


@pytest.fixture(scope="module")
def reference(subject, tmp_path_factory):
    return undisturbed(subject, tmp_path_factory.mktemp("whole") / "run")


def fail_and_go_on(subject: Subject, folder: Path, free: Callable[[], object]) -> tuple[str, Any]:
    """What the run said, and its result after it went on."""
    with pytest.raises(Unwritable) as error:
        subject.run(folder)
    free()
    subject.run(folder)
    return str(error.value), subject.result(folder)


def with_faults(subject: Subject, folder: Path, full_from: int) -> tuple[str, Any]:
    folder.mkdir()
    faults = Faults(folder, full_from=full_from)
    faults.__enter__()
    return fail_and_go_on(subject, folder, lambda: faults.__exit__())


def with_small_disk(subject: Subject, folder: Path, kilobytes: int) -> tuple[str, Any] | None:
    """A tmpfs in a mount namespace of this process; None where that is not allowed."""
    folder.mkdir()
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def mount(where: Path, kind: bytes, flags: int, options: str) -> bool:
        return libc.mount(kind, str(where).encode(), kind, ctypes.c_ulong(flags), options.encode()) == 0

    if libc.unshare(CLONE_NEWNS) or not mount(Path("/"), b"none", MS_REC | MS_PRIVATE, ""):
        return None
    if not mount(folder, b"tmpfs", 0, f"size={kilobytes}k"):
        return None
    return fail_and_go_on(subject, folder, lambda: mount(folder, b"tmpfs", MS_REMOUNT, "size=64m"))


def with_small_files(subject: Subject, folder: Path, size: int) -> tuple[str, Any]:
    """No file may grow longer than `size` bytes."""
    warm_start(folder.parent / "warm")
    folder.mkdir()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return fail_and_go_on(subject, folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))


@pytest.mark.slow
def test_space_that_ends_at_any_call(tmp_path, subject, reference):
    rng = random.Random(subject.name)
    needing = [name if name in NEEDS_SPACE else "" for name in reference.events]
    for number in range(ROUNDS):
        at = -1
        while at < 0 or not needing[at]:
            at = random_event(rng, needing)
        _, (said, result) = attempt(with_faults, subject, tmp_path / str(number), at)
        assert "Cannot write" in said, at
        assert result == reference.result, at


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", KILOBYTES)
def test_a_small_disk(tmp_path, subject, reference, kilobytes):
    _, found = attempt(with_small_disk, subject, tmp_path / "run", kilobytes)
    if found is None:
        pytest.skip("this process may not mount a tmpfs")
    assert "No space left on device" in found[0]
    assert found[1] == reference.result


@pytest.mark.slow
@pytest.mark.parametrize("size", BYTES)
def test_a_limit_on_file_size(tmp_path, subject, reference, size):
    _, (said, result) = attempt(with_small_files, subject, tmp_path / "run", size)
    assert "File too large" in said
    assert result == reference.result
