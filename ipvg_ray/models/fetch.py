"""Brings the real models into one cache: shows what is there and what is missing, pulls, checks.

The cache is `models.root`. A model is built in `.pull/` below it and moved to its place only when every file has the
announced size and checksum; a receipt in `.receipts/` then names them, so that a half pulled or damaged model is not
taken for a whole one. Hub repositories come through `huggingface_hub`, which resumes by itself, other files through
`ipvg_ray.models.download`.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ipvg_ray import files
from ipvg_ray.errors import ChecksumError, FetchError
from ipvg_ray.models import registry
from ipvg_ray.models.download import NetworkError, Report, download, unzip
from ipvg_ray.models.registry import HubSource, Model, UrlSource

__all__ = ["ChecksumError", "FetchError", "Item", "LicenceError", "Missing", "NetworkError"]
__all__ += ["check", "describe", "plan_pull", "pull"]

State = Literal["present", "incomplete", "missing"]


class LicenceError(FetchError):
    """Models whose terms leave out commercial use, asked for without accepting that."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub announces it: path in the repository, bytes, and the SHA-256 (LFS) or git blob id."""

    path: str
    size: int | None
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Remote:
    """The wanted files of a repository at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Item:
    """What a pull would do about one model.

    Attributes:
        model: its row of the registry.
        path: where it is or will be.
        state: `present`; `incomplete`, where something is at its place that is not the whole model; `missing`.
        note: what to know about the state, or why the Hub could not be asked; may be empty.
        size: bytes to download in all.
        exact: whether `size` is announced by the source, not estimated.
        held: bytes of it that an earlier, unfinished pull left.
        remote: what the Hub announces; None for other sources and where it was not reached.
    """

    model: Model
    path: Path
    state: State
    note: str
    size: int
    exact: bool
    held: int
    remote: Remote | None

    @property
    def checksums(self) -> str:
        """What the download will be checked against, in a few words."""
        source = self.model.source
        if isinstance(source, UrlSource):
            return f"sha256 {source.sha256}" if source.sha256 else "none published; recorded when pulled"
        if self.remote is None:
            return "the Hub's own, asked when pulled"
        hashed = sum(f.sha256 is not None for f in self.remote.files)
        return f"the Hub's, commit {self.remote.commit[:12]}: {hashed} sha256, {len(self.remote.files) - hashed} git"


@dataclass(frozen=True)
class Missing:
    """A model that a configuration names and that cannot be used: its field, its path, why not, and what mends it."""

    field: str
    path: Path
    reason: str
    mend: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason} ({self.path}); {self.mend}"


def plan_pull(names: Iterable[str], root: Path, *, api: Any = None) -> list[Item]:
    """What is there and what is missing of the named models, with sizes, licences and checksums. Changes nothing.

    Args:
        names: as in the configuration; repeated ones count once.
        root: the cache, `models.root`.
        api: a `huggingface_hub.HfApi`; made where not given.

    Raises:
        UnknownModelError: for a name that the registry does not have.
    """
    models = [registry.get(name) for name in dict.fromkeys(names)]
    items: list[Item] = []
    offline: NetworkError | None = None
    for model in models:
        state, note = _look(model, root.expanduser())
        remote = None
        if isinstance(model.source, HubSource) and state != "present":
            try:
                if offline:  # one wait for a network that is not there is enough
                    raise offline
                remote = _ask_hub(model.source, api)
            except FetchError as error:
                offline = error if isinstance(error, NetworkError) else None
                note = "; ".join(filter(None, (note, str(error))))
        items.append(_item(model, root.expanduser(), state, note, remote))
    return items


def describe(items: Sequence[Item]) -> str:
    """The plan as text: per model its state, size, licence, source and checksums, and the sum at the end."""
    lines = []
    for item in items:
        size = f"{'' if item.exact else 'about '}{item.size / 1e9:.3g} GB"
        held = f", {item.held / 1e9:.3g} GB of it here" if item.held else ""
        terms = item.model.licence
        lines += [
            f"{item.state:<10} {item.model.name}  ({size}{held})",
            f"           licence   {terms.spdx}: {terms.who}",
            f"           source    {item.model.source.url}",
            f"           checksums {item.checksums}",
        ]
        if item.note:
            lines.append(f"           note      {item.note}")
    todo = sum(item.size - item.held for item in items if item.state != "present")
    lines.append(f"to download: {todo / 1e9:.3g} GB")
    return "\n".join(lines)


def pull(
    items: Sequence[Item], root: Path, accept_licence: bool = False, *, report: Report = print, api: Any = None
) -> list[Path]:
    """Download what `plan_pull` found missing or incomplete; returns the paths of all items.

    A pull that was cut goes on where it stopped. Two pulls into one cache wait for each other.

    Raises:
        LicenceError: before anything is downloaded, where a model that leaves out commercial use is among them and
            `accept_licence` is not given.
        NetworkError, ChecksumError, FetchError: as in `download`; models finished before it stay.
    """
    root = root.expanduser()
    todo = [item for item in items if item.state != "present"]
    _ask_licence(todo, accept_licence)
    for item in todo:
        if item.path.exists() and not _receipt(item.model, root).exists():
            raise FetchError(f"{item.path} was not pulled by this program and {item.note}; move it away and try again")
    root.mkdir(parents=True, exist_ok=True)
    _ask_disk(todo, root)
    with files.file_lock(root / ".pull" / "lock"):
        for item in todo:
            if _look(item.model, root)[0] != "present":  # another process may have brought it meanwhile
                report(f"pulling {item.model.name} from {item.model.source.url}")
                _pull_one(item, root, report, api)
                report(f"{item.model.name} is whole and in place")
    return [item.path for item in items]


def check(config_models: Mapping[str, Path], *, verify: bool = False) -> list[Missing]:
    """Which of the models that a configuration names cannot be used.

    Args:
        config_models: field of the configuration (`video.model`) to the path that it stands for.
        verify: also compute the checksums of pulled models, which takes minutes for large ones.
    """
    found = []
    for field, path in config_models.items():
        known = registry.at(path)
        reason = "" if path.exists() else "nothing is there"
        if known is None:
            mend = "name a file or folder that exists"
        else:
            mend = "fetch it with `ipvg-ray models pull --profile gpu`"
            reason = reason or _flaw(known[0], known[1], verify=verify)
        if registry.is_miniature(path):
            mend = "make it with `ipvg-ray models make-mini`"
        if reason:
            found.append(Missing(field, path, reason, mend))
    return found


# --- what is there


def _receipt(model: Model, root: Path) -> Path:
    return root / ".receipts" / (model.name.replace("/", "__") + ".json")


def _stage(model: Model, root: Path) -> Path:
    return root / ".pull" / model.name.replace("/", "__")


def _look(model: Model, root: Path) -> tuple[State, str]:
    if not (root / model.name).exists():
        return "missing", ""
    flaw = _flaw(model, root)
    if flaw:
        return "incomplete", flaw
    known = files.read_json(_receipt(model, root)) is not None
    return "present", "" if known else "placed by hand: its checksums were not looked at"


def _flaw(model: Model, root: Path, *, verify: bool = False) -> str:
    """Why the model at its place is not whole; empty where it is."""
    receipt = files.read_json(_receipt(model, root))
    if receipt is not None:
        wrong = files.differing(receipt["files"], root, verify=verify)
        return f"gone or changed since it was pulled: {', '.join(wrong[:5])}" if wrong else ""
    place = root / model.name
    lacking = [pattern for pattern in model.needs if not any(p.is_file() for p in place.glob(pattern))]
    lacking += _lost_shards(place)
    return f"lacks {', '.join(lacking[:5])}" if lacking else ""


def _lost_shards(place: Path) -> list[str]:
    """Files that a `*.safetensors.index.json` of the model lists and that are not there."""
    lost = []
    for index in sorted(place.rglob("*.safetensors.index.json")) if place.is_dir() else []:
        shards = set((files.read_json(index) or {}).get("weight_map", {}).values())
        lost += [shard for shard in sorted(shards) if not (index.parent / shard).is_file()]
    return lost


def _item(model: Model, root: Path, state: State, note: str, remote: Remote | None) -> Item:
    size, exact = model.approx_bytes, False
    if isinstance(model.source, UrlSource) and model.source.size is not None:
        size, exact = model.source.size, True
    if remote is not None:
        size, exact = sum(f.size or 0 for f in remote.files), all(f.size is not None for f in remote.files)
    held = 0
    if state != "present":
        held = min(size, sum(p.stat().st_size for p in files.files_below(_stage(model, root))))
    return Item(model, root / model.name, state, note, size, exact, held, remote)


def _ask_licence(todo: Sequence[Item], accepted: bool) -> None:
    limited = registry.non_commercial(item.model for item in todo)
    if limited and not accepted:
        terms = "\n".join(f"  {m.name}: {m.licence.spdx}, {m.licence.who} ({m.licence.url})" for m in limited)
        raise LicenceError(f"not for commercial use:\n{terms}\nread the terms and add --accept-licence if you may")


def _ask_disk(todo: Sequence[Item], root: Path) -> None:
    need = sum(item.size - item.held for item in todo)
    free = shutil.disk_usage(root).free
    if need > free:
        raise FetchError(f"{need / 1e9:.1f} GB are to be downloaded and {root} has {free / 1e9:.1f} GB free")


# --- pulling


def _pull_one(item: Item, root: Path, report: Report, api: Any) -> None:
    stage = _stage(item.model, root)
    stage.mkdir(parents=True, exist_ok=True)
    source = item.model.source
    if isinstance(source, HubSource):
        remote = item.remote or _ask_hub(source, api)
        _pull_hub(source, remote, stage, report)
        _place(item.model, stage / source.subpath, root, source=f"{source.url}/tree/{remote.commit}")
    else:
        _place(item.model, _pull_url(item.model, source, stage, report), root, source=source.url)
    shutil.rmtree(stage, ignore_errors=True)  # gone already where all of it was the model


def _pull_url(model: Model, source: UrlSource, stage: Path, report: Report) -> Path:
    archive = stage / source.url.rpartition("/")[2]
    if not archive.exists():
        download(source.url, archive, size=source.size, sha256=source.sha256, report=report)
    if source.unpack is None:
        return archive
    unpacked = stage / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unzip(archive, unpacked, source.strip)
    lacking = [pattern for pattern in model.needs if not any(unpacked.glob(pattern))]
    if lacking:
        raise FetchError(f"{archive.name} unpacked without {', '.join(lacking)}")
    return unpacked


def _ask_hub(source: HubSource, api: Any) -> Remote:
    """The wanted files as the Hub announces them. Raises NetworkError or FetchError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = (api or HfApi()).model_info(source.repo, revision=source.revision, files_metadata=True, timeout=30)
    except HfHubHTTPError as error:
        raise FetchError(f"the Hub refuses {source.repo}: {_brief(error)}") from error
    except _transport_errors() as error:
        raise NetworkError(f"the Hugging Face Hub cannot be reached: {_brief(error)}") from error
    wanted = tuple(
        RemoteFile(s.rfilename, s.size, s.lfs["sha256"] if s.lfs else None, s.blob_id)
        for s in info.siblings or ()
        if any(fnmatch.fnmatchcase(s.rfilename, pattern) for pattern in source.allow)
    )
    if not wanted or not info.sha:
        raise FetchError(f"{source.url} at {info.sha} has none of {', '.join(source.allow)}")
    return Remote(info.sha, wanted)


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises when a transfer fails, over whichever HTTP library this version of it uses."""
    from huggingface_hub import errors

    http_errors = [c for c in errors.HfHubHTTPError.__bases__ if issubclass(c, Exception)]
    return (*http_errors, OSError, RuntimeError, getattr(errors, "XetDownloadError", OSError))


def _pull_hub(source: HubSource, remote: Remote, stage: Path, report: Report) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(source.repo, revision=remote.commit, local_dir=stage, allow_patterns=list(source.allow))
    except _transport_errors() as error:
        raise NetworkError(
            f"pulling {source.repo} was cut ({_brief(error)}); what came is kept, run the same command again to go on"
        ) from error
    report(f"checking {len(remote.files)} files of {source.repo}")
    for file in remote.files:
        _verify(file, stage / file.path)
    shutil.rmtree(stage / ".cache", ignore_errors=True)  # the Hub client's own notes


def _verify(file: RemoteFile, path: Path) -> None:
    """Raise NetworkError for a file that did not come, ChecksumError for a wrong one, which is removed."""
    if not path.is_file():  # without a network the client hands back an unfinished folder as if it were whole
        raise NetworkError(f"{file.path} did not come; run the same command again where there is a network")
    right = file.size is None or path.stat().st_size == file.size
    if right and file.sha256:
        right = files.sha256_file(path) == file.sha256
    elif right and file.blob:
        right = files.git_blob_sha1(path) == file.blob
    if not right:
        path.unlink()
        raise ChecksumError(f"{file.path} is not what the Hub announced; thrown away, run the same command again")


def _place(model: Model, made: Path, root: Path, *, source: str) -> None:
    """Move a checked model to its place. The receipt comes first: without the model it says nothing."""
    target = root / model.name
    content = files.listing(files.files_below(made), made)  # a single file is listed as "."
    placed = {(target / name).relative_to(root).as_posix(): facts for name, facts in content.items()}
    if target.exists():
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    files.write_json(_receipt(model, root), {"model": model.name, "source": source, "files": placed})
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, target)
