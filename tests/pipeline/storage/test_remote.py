"""A folder at a URL and its copy here: what is finished goes there, and comes back where it is missing."""

from pathlib import Path

import fsspec
import pytest

from bitpress.pipeline.errors import ConfigError, DiskError
from bitpress.pipeline.storage.remote import RemoteFolder, local_output

FILES = ("a/artifact/bitpress.json", "a/artifact/x.safetensors", "a/metrics.json", "report.html")
STAYS = ("a/.lock", ".shared/s.safetensors", "a/states/00001.safetensors", "a/artifact.tmp/y.safetensors")


def fill(folder: Path, names: tuple[str, ...] = FILES + STAYS) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")


def contents(url: str) -> dict[str, bytes]:
    system, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/"): system.cat_file(path) for path in system.find(root)}


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_what_is_finished_goes_and_comes_back(protocol: str, tmp_path: Path) -> None:
    url = f"{protocol}://{tmp_path}/bucket/run"
    fill(tmp_path / "here")
    here, other = RemoteFolder(url, tmp_path / "here"), RemoteFolder(url, tmp_path / "other")
    assert (here.fetch(), here.send(), here.send()) == (0, 4, 0)
    assert contents(url) == {name: f"content of {name}".encode() for name in FILES}
    assert (other.fetch(), other.fetch(), other.send()) == (4, 0, 0)
    assert (other.local / FILES[0]).read_text() == f"content of {FILES[0]}"
    (here.local / FILES[1]).unlink()
    fill(here.local, ("a/artifact/z.safetensors",))
    assert here.send() == 1
    assert sorted(contents(url)) == [
        "a/artifact/bitpress.json",
        "a/artifact/z.safetensors",
        "a/metrics.json",
        "report.html",
    ]
    (other.local / FILES[3]).write_text("changed here")
    assert other.fetch() == 1
    assert (other.local / FILES[3]).read_text() == "changed here"


def test_what_says_that_all_is_there_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "here")
    system = fsspec.filesystem("memory")
    order: list[str] = []
    put = type(system).put_file
    monkeypatch.setattr(type(system), "put_file", lambda *a, **k: order.append(Path(a[2]).name) or put(*a, **k))
    RemoteFolder("memory://last/run", tmp_path / "here").send()
    assert order == ["x.safetensors", "report.html", "bitpress.json", "metrics.json"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    for url, said in (("nowhere://b/run", "nowhere"), ("s3://b/run", "s3fs")):
        with pytest.raises(ConfigError, match=rf"output: {url} cannot be used \(.*{said}"):
            RemoteFolder(url, tmp_path).send()

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("403")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", refuse)
    with pytest.raises(DiskError, match=r"the storage refuses \(PermissionError: 403\)"):
        RemoteFolder("memory://b/run", tmp_path).send()


def test_a_url_has_a_folder_of_its_own_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_output("runs") == Path("runs")
    assert local_output("s3://b/a").parent == tmp_path / "bitpress" / "outputs"
    assert local_output("s3://b/a") != local_output("s3://b/b")
