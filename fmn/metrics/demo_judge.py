"""The demo's own judges: two small classifiers of different kinds, apart from the generator.

Made by ``demo/judges.py``; docs/judges.md says how, and how often they are right.
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import LayerNorm, Linear
from torch.nn.functional import conv2d, gelu, scaled_dot_product_attention

from ..errors import ForgetError
from ..files import DEMO_FOLDER, open_safetensors
from ..images import square
from .judge import check_images, labels_of

FILE = DEMO_FOLDER / "fmn-demo-judges.safetensors"
SIDE = 48  # pixels; what both networks look at
NOTHING = "nothing"
BATCH = 64


class Bottleneck(nn.Module):
    """A residual block (He et al. 2016, arXiv 1603.05027, figure 4e)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        sizes = (width, inner, 1), (inner, inner, 3), (inner, width, 1)
        self.layers = nn.Sequential(*[_conv(*size) for size in sizes])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Convolution(nn.Module):
    """Without a bias, its weights a matrix [out, in * size^2], as the optimizer Muon takes them."""

    def __init__(self, before: int, after: int, size: int, stride: int = 1):
        super().__init__()
        self.shape, self.stride = (after, before, size, size), stride
        self.weight = nn.Parameter(torch.empty(after, before * size**2))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv2d(x, self.weight.view(self.shape), None, self.stride, self.shape[-1] // 2)


def _conv(before: int, after: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(before), nn.GELU(), Convolution(before, after, size, stride)
    )


class Convolutions(nn.Module):
    """A residual convolutional network: [N, 3, 48, 48] to features [N, 256]."""

    width = 256

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [Convolution(3, 32, 5, stride=2)]
        for before, after, inner, blocks in ((32, 64, 32, 2), (64, 128, 64, 3), (128, 256, 128, 2)):
            layers += [_conv(before, after, 3, stride=2)]
            layers += [Bottleneck(after, inner) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(256), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))


class Attentive(nn.Module):
    """A layer of a transformer with pre-norm (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = LayerNorm(width), LayerNorm(width)
        self.qkv, self.out = Linear(width, 3 * width, bias=False), Linear(width, width)
        self.up, self.down = Linear(width, 3 * width), Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], 3, self.heads, -1)
        q, k, v = self.qkv(self.norm_1(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(gelu(self.up(self.norm_2(x))))


class Patches(nn.Module):
    """A small vision transformer: [N, 3, 48, 48] to features [N, 128].

    Its patches of 8 x 8 pixels are embedded by three strided convolutions, from which small sets
    are learned sooner (Xiao et al. 2021, arXiv 2106.14881).
    """

    width, patch = 128, 8

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(
            Convolution(3, 32, 3, stride=2),
            _conv(32, 64, 3, stride=2),
            _conv(64, self.width, 3, stride=2),
        )
        self.places = nn.Parameter(torch.randn((SIDE // self.patch) ** 2, self.width) * 0.02)
        self.layers = nn.Sequential(*[Attentive(self.width, 4) for _ in range(5)])
        self.norm = LayerNorm(self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.places
        return self.norm(self.layers(tokens)).mean(1)


ARCHITECTURES: dict[str, type[Convolutions] | type[Patches]] = {
    "demo": Convolutions,
    "demo:2": Patches,
}


class Network(nn.Module):
    """A trunk of either kind, with one linear head for each domain.

    Args:
        name: a key of ``ARCHITECTURES``.
        labels: of each domain.
    """

    def __init__(self, name: str, labels: dict[str, tuple[str, ...]]):
        super().__init__()
        self.trunk = ARCHITECTURES[name]()
        self.heads = nn.ModuleDict(
            {domain: Linear(self.trunk.width, len(names)) for domain, names in labels.items()}
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits for each domain, of pictures [N, 3, 48, 48] in 0..1."""
        features = self.trunk(x * 2 - 1)
        return {domain: head(features) for domain, head in self.heads.items()}


class DemoJudge:
    """One of the two judges in the file beside the demo model; see ``judge.Judge``.

    Attributes:
        facts: how often it was right, as ``demo/judges.py`` measured; strings and numbers.
    """

    labels: dict[str, tuple[str, ...]]

    def __init__(self, name: str = "demo", path: str | Path = FILE):
        self.name = name
        self.labels, self.facts, state = _read(Path(path), name)
        self._network = Network(name, self.labels).eval()
        try:
            self._network.load_state_dict(state)
        except RuntimeError as error:
            raise _broken(path) from error

    def probabilities(self, images: torch.Tensor, domain: str) -> torch.Tensor:
        labels_of(self, domain)
        head = self._network.heads[domain]
        return torch.softmax(head(self.features(images)), -1).detach()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        images = check_images(images)
        parts = [self._network.trunk(square(part, SIDE) * 2 - 1) for part in images.split(BATCH)]
        return torch.cat(parts)


def _read(
    path: Path, name: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, object], dict[str, torch.Tensor]]:
    """(labels, facts, weights in float32) of one judge."""
    if not path.is_file():
        raise ForgetError(f"The demo's judges are missing at '{path}': get the repository again.")
    try:
        with open_safetensors(path, "get the repository again") as file:
            record = json.loads((file.metadata() or {})["judges"])
            prefix = f"{name}/"
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            state = {key.removeprefix(prefix): file.get_tensor(key).float() for key in names}
        labels = {domain: tuple(names) for domain, names in record["labels"].items()}
        return labels, record["facts"][name], state
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _broken(path) from error


def _broken(path: str | Path) -> ForgetError:
    return ForgetError(
        f"'{path}' does not hold the demo's judges as 'demo/judges.py train' writes them: "
        "get the repository again, or make the file anew."
    )
