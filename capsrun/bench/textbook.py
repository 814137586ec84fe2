"""CapsNet as a tutorial would write it: what the speed of capsrun is measured against.

Eager PyTorch in float32; votes by one broadcast matrix product over (B, I, J, D, K); a DataLoader
that shifts each image by itself. It has the layers and the parameter count of the real one, so that
the times compare; nothing else in capsrun uses it.

Shapes: B batch, C channels, H and W pixels, I input capsules, J output capsules, K input dimension,
D output dimension.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from capsrun.data import Split
from capsrun.models.capsnet import CapsNet


def squash(poses: Tensor) -> Tensor:
    """Eq. 1, with the usual epsilon."""
    square = (poses**2).sum(dim=-1, keepdim=True)
    return square / (1 + square) * poses / torch.sqrt(square + 1e-8)


class TextbookCapsNet(nn.Module):
    """The network of §4 with the sizes of `like`."""

    def __init__(self, like: CapsNet) -> None:
        super().__init__()
        config = like.config
        self.dimensions, self.iterations = config.primary_dimensions, like.routing.iterations
        self.conv1 = nn.Conv2d(like.channels, config.conv1_channels, config.kernel_px)
        maps = config.primary_types * config.primary_dimensions
        self.primarycaps = nn.Conv2d(config.conv1_channels, maps, config.kernel_px, stride=2)
        self.weight = nn.Parameter(
            0.1
            * torch.randn(
                like.primary_capsules, like.classes, config.digit_dimensions, self.dimensions
            )
        )
        widths = [like.classes * config.digit_dimensions, *config.decoder_widths]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, widths[1:]):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        layers += [nn.Linear(widths[-1], like.channels * like.image_px**2), nn.Sigmoid()]
        self.decoder = nn.Sequential(*layers)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the capsule lengths (B, J) and the flat reconstructions (B, C · H · W)."""
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
        mask_BJ = F.one_hot(labels_B, capsules_BJD.shape[1]).float()
        return capsules_BJD.norm(dim=-1), self.decoder(
            (capsules_BJD * mask_BJ[..., None]).flatten(1)
        )


class ShiftedImages(Dataset):
    """Images moved at random, one at a time, as `torchvision.transforms.RandomCrop` does."""

    def __init__(self, split: Split, shift_px: int) -> None:
        self.images_NCHW = split.images_NCHW.cpu()
        self.labels_N = split.labels_N.cpu()
        self.shift_px = shift_px

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images_NCHW[index].float() / 255
        pixels, shift = image.shape[-1], self.shift_px
        row, column = torch.randint(0, 2 * shift + 1, (2,)).tolist()
        padded = F.pad(image, (shift, shift, shift, shift))
        return padded[:, row : row + pixels, column : column + pixels], self.labels_N[index]


def textbook_steps(
    like: CapsNet, split: Split, batch_size: int, shift_px: int, device: torch.device
) -> Callable[[int], None]:
    """A function that makes a number of training steps of a new textbook CapsNet."""
    model = TextbookCapsNet(like).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(
        ShiftedImages(split, shift_px), batch_size=batch_size, shuffle=True, drop_last=True
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    endless = batches()

    def advance(count: int) -> None:
        for _ in range(count):
            images_BCHW, labels_B = (tensor.to(device) for tensor in next(endless))
            lengths_BJ, drawn = model(images_BCHW, labels_B)
            present_BJ = F.one_hot(labels_B, lengths_BJ.shape[1]).float()
            margin = present_BJ * F.relu(0.9 - lengths_BJ) ** 2
            margin = margin + 0.5 * (1 - present_BJ) * F.relu(lengths_BJ - 0.1) ** 2
            difference = ((drawn - images_BCHW.flatten(1)) ** 2).sum(dim=1)
            loss = margin.sum(dim=1).mean() + 0.0005 * difference.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return advance
