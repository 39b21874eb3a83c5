"""Locked towers and their thawing: what trains at a given point of a run, as a function of that point alone.

LiT: Zhai et al. 2021, arXiv 2111.07991. Layer groups are open_clip's and timm's.
"""

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import lock_text_tower
from timm.models import group_parameters
from torch import nn

from data_pipelines.errors import ConfigError
from vlp.models.config import ModelConfig


def apply(model: nn.Module, config: ModelConfig, progress: float) -> bool:
    """Lock and thaw the towers as `config` asks after this share (0..1) of the run; True if anything changed.

    The result depends on `progress` alone, not on earlier calls, so a resume at any step finds the same state. Call it
    before every step, and `set_training` after it changed something. An optimiser made at progress 1.0 knows every
    parameter that ever trains; those without a gradient stay as they are.
    """
    before = [parameter.requires_grad for parameter in model.parameters()]
    fixed = _never_trained(model)
    model.requires_grad_(True)
    if _locked(config.lock_image, config.thaw_image_at, progress):
        _lock_image(model, config.lock_image_unlocked_groups)
    if _locked(config.lock_text, config.thaw_text_at, progress):
        _lock_text(model, config.lock_text_unlocked_layers)
    for name in fixed:
        model.get_parameter(name).requires_grad_(False)
    return before != [parameter.requires_grad for parameter in model.parameters()]


def set_training(model: nn.Module) -> None:
    """Training mode, but what is frozen whole stays in evaluation mode: batch-norm statistics must not drift."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _locked(lock: bool, thaw_at: float | None, progress: float) -> bool:
    return lock and (thaw_at is None or progress < thaw_at)


def _lock_image(model: nn.Module, groups: int) -> None:
    tower = model.get_submodule("visual")
    if isinstance(tower, TimmModel):
        trunk = tower.trunk
        if not groups:
            trunk.requires_grad_(False)
            return
        names = group_parameters(trunk, trunk.group_matcher())  # open_clip imports it from where timm gives it up
        for group in sorted(names)[: max(0, len(names) - groups)]:
            for name in names[group]:
                trunk.get_parameter(name).requires_grad_(False)
    elif groups and isinstance(tower, ModifiedResNet):
        raise ConfigError(f"model.lock_image_unlocked_groups={groups}: open_clip locks its ResNets whole; set 0")
    else:
        # batch norms are left alone here: open_clip would exchange the modules, which no thawing undoes
        tower.lock(unlocked_groups=groups, freeze_bn_stats=False)  # type: ignore[operator]


def _lock_text(model: nn.Module, layers: int) -> None:
    text = getattr(model, "text", None)
    if isinstance(text, HFTextEncoder):
        _lock_transformer(text.transformer, layers)
    else:
        lock_text_tower(model, layers)


def _lock_transformer(transformer: nn.Module, layers: int) -> None:
    """Freeze embeddings and all but the last layers; open_clip knows the layers of some Hugging Face models only."""
    lists = [(name, module) for name, module in transformer.named_modules() if isinstance(module, nn.ModuleList)]
    where, blocks = max(lists, key=lambda item: len(item[1]))
    frozen = tuple(f"{where}.{number}." for number in range(len(blocks) - layers))
    for name, parameter in transformer.named_parameters():
        below = name.startswith(frozen) or ("embed" in name and layers <= len(blocks))
        if below or layers == 0:
            parameter.requires_grad_(False)


def _never_trained(model: nn.Module) -> frozenset[str]:
    """Names of parameters that are constants, such as sine positions: those frozen before anything was locked."""
    if not hasattr(model, "never_trained"):
        names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        model.never_trained = frozenset(names)  # type: ignore[assignment]
    known: frozenset[str] = model.never_trained  # type: ignore[assignment]
    return known
