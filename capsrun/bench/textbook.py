"""CapsNet as a tutorial would write it: what the speed of capsrun is measured against.

Eager PyTorch in float32; votes by one broadcast matrix product over (B, I, J, D, K); a DataLoader
that shifts (and for two digits adds) each image by itself. It has the layers and the parameter
count of the real one, so that the times compare; nothing else in capsrun uses it.

Shapes: B batch, C channels, H and W pixels, I input capsules, J output capsules, K input dimension,
D output dimension, T digits in one image.
"""

from collections.abc import Callable
from itertools import chain, pairwise, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from capsrun.data_config import DatasetConfig
from capsrun.model_config import DynamicRoutingConfig
from capsrun.models.capsnet import CapsNet
from capsrun.models.layers import routing_config


def squash(poses: Tensor) -> Tensor:
    """Eq. 1, with the usual epsilon."""
    square = (poses**2).sum(dim=-1, keepdim=True)
    return square / (1 + square) * poses / torch.sqrt(square + 1e-8)


class TextbookCapsNet(nn.Module):
    """The network of §4 with the sizes of `like`."""

    def __init__(self, like: CapsNet) -> None:
        super().__init__()
        config = like.config
        # Beside another algorithm it is the paper's, with the usual iterations.
        routing = like.routing
        routing = routing if isinstance(routing, DynamicRoutingConfig) else routing_config()
        self.iterations = routing.iterations
        self.dimensions = config.primary_dimensions
        kernel_px, pad_px = config.kernel_px, config.kernel_px // 2 * (config.padding == "same")
        self.conv1 = nn.Conv2d(like.channels, config.conv1_channels, kernel_px, 1, pad_px)
        maps = config.primary_types * config.primary_dimensions
        self.primarycaps = nn.Conv2d(config.conv1_channels, maps, kernel_px, 2, pad_px)
        shape = like.primary_capsules, like.classes, config.digit_dimensions, self.dimensions
        self.weight = nn.Parameter(0.1 * torch.randn(shape))
        masked, pixels = like.classes * config.digit_dimensions, like.channels * like.image_px**2
        widths = [masked, *config.decoder_widths, pixels]
        layers = [(nn.Linear(size, next_size), nn.ReLU()) for size, next_size in pairwise(widths)]
        self.decoder = nn.Sequential(*chain(*layers))
        self.decoder[-1] = nn.Sigmoid()

    def forward(self, images_BCHW: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the capsule lengths (B, J) and the flat reconstructions (B, T, C · H · W)."""
        maps = self.primarycaps(F.relu(self.conv1(images_BCHW)))
        poses = maps.unflatten(1, (-1, self.dimensions)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        poses_BIK = squash(poses)
        votes_BIJD = torch.matmul(self.weight, poses_BIK[:, :, None, :, None]).squeeze(-1)
        logits_BIJ1 = torch.zeros_like(votes_BIJD[..., :1])
        for iteration in range(self.iterations):
            couplings_BIJ1 = logits_BIJ1.softmax(dim=2)
            capsules_B1JD = squash((couplings_BIJ1 * votes_BIJD).sum(dim=1, keepdim=True))
            if iteration < self.iterations - 1:
                logits_BIJ1 = logits_BIJ1 + (votes_BIJD * capsules_B1JD).sum(-1, keepdim=True)
        capsules_BJD = capsules_B1JD.squeeze(1)
        mask_BTJ = F.one_hot(labels_BT, capsules_BJD.shape[1]).float()
        masked_BTJD = capsules_BJD[:, None] * mask_BTJ[..., None]
        return capsules_BJD.norm(dim=-1), self.decoder(masked_BTJD.flatten(2))


class ShiftedImages(Dataset):
    """Images moved at random on their canvas, one at a time, and added where there are two."""

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, config: DatasetConfig) -> None:
        self.images_NCHW, self.labels_N, self.config = images_NCHW, labels_N, config

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """An image, its labels (T,) and what each digit is by itself (T, C, H, W)."""
        indices = [index, *torch.randint(0, len(self), (self.config.digits - 1,)).tolist()]
        targets_TCHW = torch.stack([self._moved(self.images_NCHW[i]) for i in indices])
        return targets_TCHW.sum(0).clamp(max=1), self.labels_N[indices].long(), targets_TCHW

    def _moved(self, image_CHW: Tensor) -> Tensor:
        """As `torchvision.transforms.RandomCrop` does it: padded, then cut at a random place."""
        pixels, shift = self.config.image_px, self.config.shift_px
        pad = (pixels - image_CHW.shape[-1]) // 2 + shift
        row, column = torch.randint(0, 2 * shift + 1, (2,)).tolist()
        padded = F.pad(image_CHW.float() / 255, (pad, pad, pad, pad))
        return padded[:, row : row + pixels, column : column + pixels]


def textbook_steps(
    like: CapsNet,
    images_NCHW: Tensor,
    labels_N: Tensor,
    config: DatasetConfig,
    batch_size: int,
    device: torch.device,
) -> Callable[[int], None]:
    """A function that makes a number of training steps of a new textbook CapsNet."""
    model = TextbookCapsNet(like).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    images = ShiftedImages(images_NCHW, labels_N, config)
    loader = DataLoader(images, batch_size=batch_size, shuffle=True, drop_last=True)

    batches = chain.from_iterable(repeat(loader))

    def advance(count: int) -> None:
        for _ in range(count):
            images_BCHW, labels_BT, targets_BTCHW = (t.to(device) for t in next(batches))
            lengths_BJ, drawn = model(images_BCHW, labels_BT)
            present_BJ = F.one_hot(labels_BT, lengths_BJ.shape[1]).sum(1).float()
            margin = present_BJ * F.relu(0.9 - lengths_BJ) ** 2
            margin = margin + 0.5 * (1 - present_BJ) * F.relu(lengths_BJ - 0.1) ** 2
            difference = ((drawn - targets_BTCHW.flatten(2)) ** 2).sum(dim=(1, 2))
            loss = margin.sum(dim=1).mean() + 0.0005 * difference.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return advance
