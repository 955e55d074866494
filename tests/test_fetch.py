"""Downloads go through a stand-in for pip, a package found before the real one, that does as told."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest

from minipeft import fetch as fetching
from minipeft.fetch import FetchError, Package, cache_folder, fetch

PIP = '''
import os, pathlib, shutil, sys, time
folder = pathlib.Path(os.environ["STAND_IN"])
options = sys.argv[1:]
calls = folder / "calls"
with open(calls, "a") as file:
    wanted = pathlib.Path(options[options.index("--requirement") + 1]).read_text()
    file.write(" ".join(options) + " wanted: " + wanted)
acts = (folder / "acts").read_text().split()
act = acts[min(len(calls.read_text().splitlines()), len(acts)) - 1]
into = pathlib.Path(options[options.index("--dest") + 1])
good = next(folder.glob("toy-*"))
if act == "good":
    shutil.copy(good, into)
elif act == "slow":
    time.sleep(1)
    shutil.copy(good, into)
elif act == "truncated":
    (into / good.name).write_bytes(good.read_bytes()[:-40])
elif act == "refused":
    sys.exit("ERROR: the index is closed on Sundays")
elif act == "hang":
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
'''


def unpack(archive, folder):
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An empty cache, one small package called "toy", and `toy.acts("good")` for the next calls."""
    with zipfile.ZipFile(tmp_path / "toy-1.0-py3-none-any.whl", "w") as file:
        file.writestr("greeting.txt", "hello " * 100)
        file.writestr("deep/number.txt", "42")
    source = tmp_path / "toy-1.0-py3-none-any.whl"
    package = Package("toy==1.0", source.name, fetching._sha256(source), 0.1, unpack)
    (tmp_path / "stand-in" / "pip").mkdir(parents=True)
    (tmp_path / "stand-in" / "pip" / "__init__.py").write_text("")
    (tmp_path / "stand-in" / "pip" / "__main__.py").write_text(PIP)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stand-in'}{os.pathsep}{os.getcwd()}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # for the tests that turn to the real pip
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "PACKAGES", {"toy": package})

    class Toy:
        folder = tmp_path / "cache" / "toy"
        download = tmp_path / "cache" / "downloads" / source.name
        conversions = tmp_path / "conversions"  # one line for each, by other processes

        def acts(self, *acts):
            (tmp_path / "acts").write_text(" ".join(acts))

        def calls(self):
            path = tmp_path / "calls"
            return path.read_text().splitlines() if path.exists() else []

    toy = Toy()
    toy.package = package
    toy.acts("good")
    return toy


def whole(toy):
    return fetching._damage(toy.folder, toy.package, every_byte=True) is None


def nothing_lies_about(toy):
    return {path.name for path in toy.folder.parent.iterdir()} <= {"toy", "downloads", "toy.lock"}


def test_the_cache_is_where_you_say_or_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MINIPEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "minipeft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "minipeft"


def test_a_package_is_downloaded_once_and_used_from_then_on(toy):
    assert fetch("toy") == toy.folder
    assert (toy.folder / "greeting.txt").read_text() == "hello " * 100
    assert whole(toy) and nothing_lies_about(toy)
    for _ in range(3):
        fetch("toy")
    assert len(toy.calls()) == 1


def test_pip_is_told_the_version_the_hash_and_the_kind_of_file(toy, monkeypatch):
    fetch("toy")
    source = Package("toy==1.0", "toy-1.0.tar.gz", toy.package.sha256, 0.1, unpack)
    monkeypatch.setattr(fetching, "PACKAGES", {"source": source})
    fetch("source")
    first, second = toy.calls()
    for call in (first, second):
        assert call.startswith("download ") and "--no-deps --require-hashes" in call
        assert call.endswith(f"wanted: toy==1.0 --hash=sha256:{toy.package.sha256}")
    assert "--only-binary toy" in first and "--no-binary toy" in second


def test_an_interrupted_download_is_repeated(toy):
    toy.acts("truncated", "good")
    fetch("toy")
    assert len(toy.calls()) == 2 and "--no-cache-dir" in toy.calls()[1]
    assert whole(toy) and nothing_lies_about(toy)


def test_a_package_with_another_hash_is_never_used(toy):
    toy.acts("truncated")
    with pytest.raises(FetchError, match="has the SHA-256"):
        fetch("toy")
    assert not toy.folder.exists() and not toy.download.exists() and nothing_lies_about(toy)


def test_a_download_damaged_in_the_cache_is_fetched_again(toy, capsys):
    toy.download.parent.mkdir(parents=True)
    toy.download.write_bytes(b"half of it")
    fetch("toy")
    assert "in the cache is damaged" in capsys.readouterr().err
    assert whole(toy) and len(toy.calls()) == 1


def test_a_failure_shows_what_pip_said_and_what_to_do(toy, tmp_path):
    toy.acts("refused")
    with pytest.raises(FetchError) as error:
        fetch("toy")
    message = str(error.value)
    assert "the index is closed on Sundays" in message
    for what in ("toy==1.0", "python -m minipeft.fetch", "MINIPEFT_CACHE", str(tmp_path / "cache")):
        assert what in message
    assert nothing_lies_about(toy)


def wheel(path, text):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("greeting.txt", text)
        file.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        file.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("toy-1.0.dist-info/RECORD", "")


def test_the_real_pip_takes_the_pinned_file_and_refuses_another(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    offered = tmp_path / "links" / "toy-1.0-py3-none-any.whl"
    offered.parent.mkdir()
    wheel(offered, "right")
    package = Package("toy==1.0", offered.name, fetching._sha256(offered), 0.1, unpack)
    monkeypatch.setattr(fetching, "PACKAGES", {"toy": package, "again": package})
    assert (fetch("toy") / "greeting.txt").read_text() == "right"
    toy.download.unlink()
    wheel(offered, "wrong")
    with pytest.raises(FetchError, match="DO NOT MATCH THE HASHES"):
        fetch("again")


def test_a_python_without_pip_is_told_how_to_get_it(toy):
    said = f"{sys.executable}: No module named pip"
    assert "ensurepip" in fetching._help("toy", toy.package, toy.folder.parent, said)
    assert "ensurepip" not in fetching._help("toy", toy.package, toy.folder.parent, "anything else")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "greeting.txt").write_text("hello"),
        lambda folder: (folder / "deep" / "number.txt").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[1]"),
        lambda folder: (folder / "manifest.json").write_text('{"layout": 0, "source": "", "files": {}}'),
    ],
    ids=["truncated", "file missing", "manifest missing", "manifest cut", "manifest odd", "older layout"],
)
def test_a_damaged_entry_is_built_again_from_the_download(toy, damage, capsys):
    fetch("toy")
    damage(toy.folder)
    fetch("toy")
    assert whole(toy) and nothing_lies_about(toy)
    assert (toy.folder / "deep" / "number.txt").read_text() == "42"
    assert "building it again" in capsys.readouterr().err
    assert len(toy.calls()) == 1  # the download was still good


def test_the_command_finds_a_changed_byte_and_prints_where_things_are(toy, capsys):
    fetch("toy")
    (toy.folder / "deep" / "number.txt").write_text("43")  # the size stays
    assert fetching.main() == 0
    assert (toy.folder / "deep" / "number.txt").read_text() == "42"
    assert str(toy.folder) in capsys.readouterr().out


def test_the_command_ends_with_one_and_the_message_when_it_cannot(toy, capsys):
    toy.acts("refused")
    assert fetching.main() == 1
    assert "closed on Sundays" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_says_so(toy, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.raises(FetchError, match="could not write the cache .*a file.*MINIPEFT_CACHE"):
        fetch("toy")


def test_a_whole_cache_is_used_without_writing_to_it(toy, monkeypatch):
    fetch("toy")
    monkeypatch.setattr("filelock.FileLock", lambda path: pytest.fail("took the lock"))
    before = sorted((path, path.stat().st_mtime_ns) for path in toy.folder.parent.rglob("*"))
    fetch("toy")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in toy.folder.parent.rglob("*"))


def test_a_failed_conversion_leaves_the_old_entry_and_nothing_else(toy, monkeypatch):
    fetch("toy")
    (toy.folder / "greeting.txt").write_text("hello")

    def broken(archive, folder):
        (folder / "half").write_text("")
        raise ValueError("no such tensor")

    package = Package("toy==1.0", toy.package.file, toy.package.sha256, 0.1, broken)
    monkeypatch.setattr(fetching, "PACKAGES", {"toy": package})
    with pytest.raises(ValueError, match="no such tensor"):
        fetch("toy")
    assert (toy.folder / "greeting.txt").read_text() == "hello" and nothing_lies_about(toy)


CHILD = """
    import sys, time, zipfile
    from minipeft import fetch as fetching

    def unpack(archive, folder):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        with open(sys.argv[4], "a") as file:
            file.write("converted\\n")
        if sys.argv[3] == "stay":
            print("converting", flush=True)
            time.sleep(60)

    fetching.PACKAGES = {"toy": fetching.Package("toy==1.0", sys.argv[1], sys.argv[2], 0.1, unpack)}
    print((fetching.fetch("toy") / "deep" / "number.txt").read_text())
"""


def child(toy, what=""):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), toy.package.file, toy.package.sha256, what]
    return subprocess.Popen([*command, str(toy.conversions)], stdout=subprocess.PIPE, text=True)


def test_processes_that_fetch_at_once_share_one_download_and_one_conversion(toy):
    toy.acts("slow")
    children = [child(toy) for _ in range(3)]
    assert [process.communicate()[0] for process in children] == ["42\n"] * 3
    assert [process.returncode for process in children] == [0] * 3
    assert len(toy.calls()) == 1 and toy.conversions.read_text() == "converted\n"
    assert whole(toy) and nothing_lies_about(toy)


def test_a_process_killed_while_it_converts_leaves_nothing_in_the_way(toy):
    process = child(toy, "stay")
    assert process.stdout.readline() == "converting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not nothing_lies_about(toy)
    fetch("toy")
    assert whole(toy) and nothing_lies_about(toy) and len(toy.calls()) == 1


def test_ctrl_c_ends_pip_too(toy, monkeypatch, tmp_path):
    toy.acts("hang")

    def interrupt(running, work, megabytes):
        while not (tmp_path / "pid").exists():
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_wait", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch("toy")
    assert time.monotonic() - started < 50  # it would have run for 60 s
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert nothing_lies_about(toy)


def test_someone_who_watches_sees_how_much_has_arrived(toy, monkeypatch, capsys):
    toy.acts("slow")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fetch("toy")
    assert " of 0 MB" in capsys.readouterr().err


def test_the_manifest_names_every_file(toy):
    fetch("toy")
    manifest = json.loads((toy.folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"greeting.txt", "deep/number.txt"}
    assert all(set(entry) == {"size", "sha256"} for entry in manifest["files"].values())


def test_the_packages_are_pinned_to_one_version_and_one_file():
    for package in fetching.PACKAGES.values():
        name, version = package.requirement.split("==")
        assert package.file.startswith(f"{name.replace('-', '_')}-{version}")
        assert len(package.sha256) == 64 and int(package.sha256, 16)
