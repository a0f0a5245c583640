"""The resolver over its three places, and its errors."""

import hashlib
import subprocess
import sys

import pytest

from shared.data import catalog
from shared.data.__main__ import main
from shared.data.catalog import CATALOG, DataDamaged, DataMissing, Entry, UnknownData, resolve

CONTENT = b"two\nlines\n"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A catalog with one set, and three empty data folders in search order."""
    folders = [tmp_path / "chosen", tmp_path / "shared" / "data", tmp_path / "cache" / "assay" / "data"]
    monkeypatch.setenv("ASSAY_DATA", str(folders[0]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "checkout" / "shared" / "data" / "catalog.py"))
    entry = Entry(
        "toy/set", "toy/set.jsonl", "someone/somewhere@abc: set.jsonl", "CC0", hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setattr(catalog, "CATALOG", {entry.name: entry})
    assert catalog.folders() == folders
    return folders


def put(folder, content=CONTENT):
    path = folder / "toy" / "set.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_places_are_searched_in_order(places):
    for folder in reversed(places):
        path = put(folder)
        assert resolve("toy/set") == path


def test_missing_set_names_origin_licence_and_what_to_do(places):
    with pytest.raises(DataMissing) as error:
        resolve("toy/set")
    for part in ("toy/set", "someone/somewhere@abc", "CC0", "ASSAY_DATA", str(places[-1])):
        assert part in str(error.value)


def test_wrong_content_is_refused(places):
    path = put(places[0], CONTENT[:-1])
    with pytest.raises(DataDamaged, match="not the file of the catalog") as error:
        resolve("toy/set")
    assert str(path) in str(error.value)


def test_unknown_set_suggests_the_closest():
    with pytest.raises(UnknownData, match="did you mean 'math/gsm8k_test'"):
        resolve("math/gsm8k_tset")


def test_entries_are_complete():
    for name, entry in CATALOG.items():
        assert entry.path.startswith(name + ".json")
        assert "@" in entry.origin
        assert entry.licence
        assert len(bytes.fromhex(entry.sha256)) == 32


@pytest.mark.parametrize("name", CATALOG)
def test_sets_that_are_here_match_their_checksum(name):
    if catalog.find(CATALOG[name]) is None:
        pytest.skip(f"data set {name} is not here: put it beside the clone or set ASSAY_DATA")
    resolve(name)


def test_list_says_what_is_missing(places, capsys):
    main(["list"])
    assert "toy/set  missing  CC0" in (out := capsys.readouterr().out)
    assert "0 of 1 sets are here" in out
    put(places[1])
    main(["list"])
    assert "toy/set  here     CC0" in (out := capsys.readouterr().out)
    assert "1 of 1 sets are here" in out


def test_list_is_torch_free():
    code = (
        "import sys; from shared.data.__main__ import main; main(['list']);"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
