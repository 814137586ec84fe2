"""Efficient-CapsNet (Mazzia, Salvetti and Chiaberge, 2021): small convolutions below few capsules.

Shapes: B batch, C channels, H and W pixels, I input capsules, K input dimension.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from capsrun.model_config import EfficientCapsNetConfig, RoutingConfig
from capsrun.models.capsnet import CapsNet
from capsrun.models.initialisation import he_normal
from capsrun.models.inputs import check_images
from capsrun.models.layers import convolved
from capsrun.models.self_attention import exponential_squash


class WholeCaps(nn.Conv2d):
    """Capsules that each see the whole of some maps: a depthwise convolution of their size.

    Takes maps (B, C, H, W) and returns capsules u (B, I, K), whose K numbers are of K maps each.

    types: I. output_dim: K. maps_px: H and W. squashed: whether by `exponential_squash`.
    """

    def __init__(self, types: int, output_dim: int, maps_px: int, squashed: bool) -> None:
        channels = types * output_dim
        super().__init__(channels, channels, maps_px, groups=channels)
        self.types, self.output_dim, self.squashed = types, output_dim, squashed

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Maps (B, C, H, W) to capsules u (B, I, K)."""
        bias = self.bias
        assert bias is not None
        # In the precision of the weights (float32), whatever autocast does. On a CPU this is up to
        # several times faster than PyTorch's depthwise convolution.
        maps_BHWC, weight_HWC = maps_BCHW.permute(0, 2, 3, 1), self.weight[:, 0].permute(1, 2, 0)
        capsules_BIK = ((maps_BHWC * weight_HWC).sum((1, 2)) + bias).unflatten(
            1, (self.types, self.output_dim)
        )
        return exponential_squash(capsules_BIK) if self.squashed else capsules_BIK


class EfficientCapsNet(CapsNet):
    """A CapsNet with other layers below the class capsules; else as `CapsNet` is.

    Convolutions with ReLU and then batch normalisation, `convolutions`, and few capsules that see
    all of their maps, `primarycaps`. config: see `configs/model/efficient_capsnet.yaml`.
    Raises ValueError when the image is too small for the convolutions, and for lists of layers of
    different lengths.
    """

    settings = EfficientCapsNetConfig
    config: EfficientCapsNetConfig

    def _make_encoder(self, routing: RoutingConfig, with_activations: bool) -> None:
        """The layers below the class capsules; the weights are drawn later."""
        config = self.config
        if not len(config.kernels_px) == len(config.strides) == len(config.channels) + 1:
            raise ValueError(
                "model.kernels_px and model.strides have a value for each convolution, and "
                "model.channels for each but the last, but there are "
                f"{len(config.kernels_px)}, {len(config.strides)} and {len(config.channels)}"
            )
        dimensions = config.primary_dimensions + with_activations
        widths = [self.channels, *config.channels, config.primary_types * dimensions]
        layers: list[nn.Module] = []
        side = self.image_px
        sizes = zip(itertools.pairwise(widths), config.kernels_px, config.strides, strict=True)
        for (width_in, width_out), kernel_px, stride in sizes:
            layers += [nn.Conv2d(width_in, width_out, kernel_px, stride), nn.ReLU()]
            # Keras counts what is kept of the old statistics, PyTorch what is taken of the new.
            layers.append(nn.BatchNorm2d(width_out, config.norm_epsilon, 1 - config.norm_momentum))
            side = convolved(side, kernel_px, stride, "valid")[1]
            if side < 1:
                raise ValueError(
                    f"images of {self.image_px} px are too small for the layers of {config.name}"
                )
        self.convolutions = nn.Sequential(*layers)
        self.primary_capsules = config.primary_types
        given = config.primary_types, dimensions, side
        self.primarycaps = WholeCaps(*given, squashed=not with_activations)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator, as the authors' code does.

        Paper: silent. `he_normal` in convolutions and the hidden layers of the decoder, Glorot's
        normal distribution in its last, all biases 0; in PrimaryCaps Glorot's uniform one, of which
        Keras takes the inputs of one of its maps and the outputs of all.
        """
        drawn = [*self.convolutions, *([] if self.decoder is None else self.decoder)]
        for layer in drawn:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                is_last = self.decoder is not None and layer.weight is self.decoder[-2].weight
                he_normal(layer.weight, layer.weight[0].numel() + is_last * len(layer.weight))
                torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
        weight, bias = self.primarycaps.weight, self.primarycaps.bias
        bound = math.sqrt(6 / (weight[0].numel() * (1 + len(weight))))
        weight.uniform_(-bound, bound)
        bias.zero_()
        self.digitcaps.reset_parameters()

    def primary_poses(self, images_BCHW: Tensor) -> Tensor:
        """Images with pixels in [0, 1] to PrimaryCaps outputs u of shape (B, I, K)."""
        sizes = self.channels, self.image_px
        check_images(images_BCHW, *sizes, self.standardised, self.primarycaps.weight)
        return self.primarycaps(self.convolutions(images_BCHW))
