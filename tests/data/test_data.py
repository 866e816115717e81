"""Sources of images: every format, the splits, the fitting, and a corpus of bad files."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import time
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from demerge.data import load_images, scan
from demerge.data.decode import BIG, decode, read_header
from demerge.data.listing import list_folder
from demerge.errors import DemergeError, InputError, UsageError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write_images(
    folder: Path, n: int, size: tuple[int, int] = (6, 6), mode: str = "RGB"
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.png" for i in range(n)]
    for path in paths:
        values = noise(size[1], size[0], 3) if mode == "RGB" else noise(size[1], size[0])
        Image.fromarray(values).save(path)
    return paths


def write_idx(path: Path, values: np.ndarray) -> None:
    raw = (
        b"\0\0\x08"
        + bytes([values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.tobytes()
    )
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


# -- sources ---------------------------------------------------------------------------------------


def test_digits_split_is_disjoint_and_complete():
    parts = {split: load_images("digits", split=split) for split in ("all", "train", "test")}
    assert [len(parts[s]) for s in ("all", "train", "test")] == [1797, 1297, 500]
    assert not set(parts["train"].positions) & set(parts["test"].positions)
    images = parts["all"].images([0, 1])
    assert images.shape == (2, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert len({data.fingerprint for data in parts.values()}) == 3
    assert len(parts["test"].labels) == 500


def test_cifar_folder_uses_its_own_test_split(tmp_path):
    records = {
        name: np.hstack([noise(4, 1) % 10, noise(4, 3072)])
        for name in ("data_batch_1", "data_batch_2", "test_batch")
    }
    for name, values in records.items():
        values.tofile(tmp_path / f"{name}.bin")
    test = load_images(tmp_path, split="test")
    assert len(test) == 4
    assert len(load_images(tmp_path, split="train")) == 8
    assert test.labels == records["test_batch"][:, 0].tolist()
    assert np.array_equal(
        test.images([2])[0].numpy(), records["test_batch"][2, 1:].reshape(3, 32, 32)
    )
    assert len(load_images(tmp_path / "data_batch_1.bin")) == 4


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path, suffix):
    train, test = noise(5, 4, 4), noise(3, 4, 4)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", train)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", test)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.arange(5, dtype=np.uint8))
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.arange(3, dtype=np.uint8))
    data = load_images(tmp_path, split="test")
    assert data.shape == (1, 4, 4)
    assert data.labels == [0, 1, 2]
    assert np.array_equal(data.images([1])[0, 0].numpy(), test[1])
    assert load_images(tmp_path / f"train-images-idx3-ubyte{suffix}").labels == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("shape", "expected"), [((7, 5, 5, 3), 3), ((7, 3, 5, 5), 3), ((7, 5, 5), 1), ((7, 5, 5, 1), 1)]
)
def test_npz_layouts(tmp_path, shape, expected):
    images = noise(*shape)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(7))
    data = load_images(tmp_path / "a.npz")
    order = list(data.positions)
    first = images[order[0]]
    wanted = (
        first
        if first.ndim == 2
        else (first if first.shape[0] == expected else first.transpose(2, 0, 1))
    )
    assert data.shape == (expected, 5, 5)
    assert np.array_equal(data.images([0])[0].numpy().squeeze(), wanted.squeeze())
    assert data.labels == order


def test_folder_is_recursive_sorted_and_splits_a_tenth(tmp_path):
    write_images(tmp_path / "b", 10)
    write_images(tmp_path / "a", 10)
    write_images(tmp_path / ".hidden", 3)
    train, test = (load_images(tmp_path, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 2)
    assert set(train.positions) | set(test.positions) == set(range(20))
    assert [path.parent.name for path in train.pixels.paths[:10]] == ["a"] * 10
    assert load_images(tmp_path, split="train").fingerprint == train.fingerprint


def test_folder_with_train_and_test_folders(tmp_path):
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "test", 2)
    assert len(load_images(tmp_path, split="test")) == 2
    assert scan(tmp_path).splits == {"train": 4, "test": 2}


def test_fingerprint_does_not_depend_on_the_place_but_on_the_pixels(tmp_path):
    write_images(tmp_path / "one" / "x", 3)
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "x").rename(tmp_path / "two" / "x")
    before = load_images(tmp_path / "two" / "x").fingerprint
    (tmp_path / "two" / "x").rename(tmp_path / "x")
    assert load_images(tmp_path / "x").fingerprint == before
    assert load_images(tmp_path / "x", resolution=3).fingerprint != before
    write_images(tmp_path / "x", 1)
    assert load_images(tmp_path / "x").fingerprint != before


def test_names_with_spaces_and_other_scripts(tmp_path):
    write_images(tmp_path / "数据 集", 2)
    assert load_images(tmp_path / "数据 集").name == "数据 集"


def test_limit_draws_nested_choices():
    few, more = load_images("digits", limit=10), load_images("digits", limit=20)
    assert len(few) == 10
    assert set(few.positions) < set(more.positions)
    assert len(load_images("digits", limit=10_000)) == 1797


def test_hub_without_the_extra_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'demerge\[data\]'"):
        load_images("hf:someone/cats")


class FakeSplit(list):
    """What `hub.py` uses of a split of a Hub data set."""

    Image = type("Image", (), {})
    Value = type("Value", (), {})

    @property
    def features(self):
        return {"picture": self.Image(), "text": self.Value(), "label": self.Value()}

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_hub_reads_images_captions_labels_and_splits(monkeypatch):
    rows = [
        {"picture": Image.fromarray(noise(4, 4, 3)), "text": f"cat {i}", "label": i}
        for i in range(5)
    ]
    splits = {"train": FakeSplit(rows[:3]), "test": FakeSplit(rows[3:])}
    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, config: splits)
    )
    data = load_images("hf:someone/cats:small", split="test")
    assert (data.name, data.captions, data.labels) == (
        "hf:someone/cats:small",
        ["cat 3", "cat 4"],
        [3, 4],
    )
    assert np.array_equal(
        data.images([1])[0].permute(1, 2, 0).numpy(), np.asarray(rows[4]["picture"])
    )


def test_a_scan_of_a_hub_data_set_reads_every_row(monkeypatch):
    good, bad = Image.fromarray(noise(4, 4, 3)), Image.fromarray(np.zeros((2, 2), dtype=np.float32))
    splits = {
        "train": FakeSplit(
            {"picture": image, "text": "x", "label": 0} for image in [good] * 70 + [bad]
        )
    }
    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, config: splits)
    )
    monkeypatch.setattr("demerge.data.hub.LOOK_AT", 5)
    found = scan("hf:someone/cats")
    assert (found.images, found.readable, found.usable) == (71, 70, False)
    assert found.broken[0][0] == "image 70"
    assert found.verdict.startswith("cannot be used as it is: 70 of 71 images")


# -- fitting ---------------------------------------------------------------------------------------


def test_floats_span_minus_one_to_one_and_flip_marked_rows(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 6).astype(np.uint8), (2, 6, 6))
    np.savez(tmp_path / "ramp.npz", images=ramp)
    data = load_images(tmp_path / "ramp.npz")
    plain, flipped = data.floats([0, 1]), data.floats([0, 1], [False, True])
    assert (plain.min(), plain.max()) == (-1, 1)
    assert torch.equal(flipped[0], plain[0])
    assert torch.equal(flipped[1], plain[1].flip(-1))


def test_resize_takes_the_centre_square(tmp_path):
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    image[:, 10:20] = 255
    Image.fromarray(image).save(tmp_path / "wide.png")
    data = load_images(tmp_path, resolution=5)
    assert data.shape == (3, 5, 5)
    assert data.images([0])[0, :, :, 1:4].min() >= 250  # Lanczos undershoots a little at an edge


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L")])
def test_channels_are_converted(tmp_path, channels, mode):
    write_images(tmp_path, 1, mode=mode)
    image = load_images(tmp_path, channels=channels).images([0])[0]
    assert image.shape == (channels, 6, 6)
    assert channels == 1 or torch.equal(image[0], image[2])


def test_grey_folder_keeps_one_channel_and_mixed_sizes_need_a_resolution(tmp_path):
    write_images(tmp_path / "a", 2, mode="L")
    assert load_images(tmp_path).shape == (1, 6, 6)
    write_images(tmp_path / "b", 2, size=(9, 7))
    with pytest.raises(UsageError, match="resolution"):
        load_images(tmp_path)
    assert load_images(tmp_path, resolution=4).shape == (3, 4, 4)


def test_exif_is_turned(tmp_path):
    image = Image.fromarray(noise(4, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert decode(tmp_path / "turned.png").shape == (3, 8, 4)
    header = read_header(tmp_path / "turned.png")
    assert (header.width, header.height, header.notes) == (4, 8, ("turned by EXIF",))


def test_alpha_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    assert decode(tmp_path / "clear.png").min() == 255
    assert decode(tmp_path / "grey.png").shape == (1, 4, 4)
    assert scan(tmp_path).notes == {"transparency laid on white": 2}


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 257], [32896, 65535]], dtype=np.uint16)).save(
        tmp_path / "deep.png"
    )
    assert decode(tmp_path / "deep.png")[0].tolist() == [[0, 1], [128, 255]]
    assert read_header(tmp_path / "deep.png").channels == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB"])
def test_modes_become_grey_or_colour(tmp_path, mode):
    source = Image.fromarray(noise(4, 4, 3))
    image = Image.new(mode, (4, 4)) if mode == "LAB" else source.convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr", "LAB") else "a.png")
    image.save(path)
    assert decode(path).shape[0] == read_header(path).channels


def test_decoded_images_are_kept(tmp_path):
    paths = write_images(tmp_path, 3)
    data = load_images(tmp_path)
    first = data.images([0, 1, 2])
    for path in paths:
        path.unlink()
    assert torch.equal(data.images([0, 1, 2]), first)


def test_grey_with_a_transparent_value_lies_on_white_and_stays_grey(tmp_path):
    Image.fromarray(np.array([[0, 100]], dtype=np.uint8)).save(tmp_path / "l.png", transparency=100)
    deep = Image.fromarray(np.array([[0, 25700]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png", transparency=25700)
    for name in ("l.png", "deep.png"):
        assert decode(tmp_path / name).tolist() == [[[0, 255]]]
        header = read_header(tmp_path / name)
        assert "transparency laid on white" in header.notes and header.channels == 1


def test_half_transparent_red_on_white_is_pink(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png")[:, 0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("kind", ["I", "F"])
def test_pixels_of_32_bits_are_refused(tmp_path, kind):
    values = np.array([[0, 70_000]], dtype=np.int32 if kind == "I" else np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="of unknown range"):
        decode(tmp_path / "a.tif")
    assert not scan(tmp_path).usable


def test_sixteen_bits_of_every_kind_are_scaled(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    (tmp_path / "b.pgm").write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    for name in ("a.tif", "b.pgm"):
        assert decode(tmp_path / name).tolist() == [[[0, 1, 128, 255]]]


def exchanged_profile() -> bytes:
    """An sRGB profile whose red and green primaries are exchanged."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        bytes(raw[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i
        for i in range(struct.unpack(">I", raw[128:132])[0])
    }
    r, g = tags[b"rXYZ"], tags[b"gXYZ"]
    raw[r : r + 8], raw[g : g + 8] = raw[g : g + 8], raw[r : r + 8]
    return bytes(raw)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_taken_to_srgb(tmp_path, mode):
    image = Image.new("RGB", (2, 2), (250, 10, 10))
    (image.quantize(4) if mode == "P" else image.convert(mode)).save(
        tmp_path / "a.png", icc_profile=exchanged_profile()
    )
    source = ImageCms.ImageCmsProfile(io.BytesIO(exchanged_profile()))
    right = ImageCms.profileToProfile(
        image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert (
        decode(tmp_path / "a.png")[:, 0, 0].tolist()
        == list(right.getpixel((0, 0)))
        == [10, 250, 10]
    )
    assert scan(tmp_path).notes["colour profile taken to sRGB"] == 1


def test_a_profile_of_srgb_changes_nothing_and_a_damaged_one_is_reported(tmp_path):
    values = noise(8, 8, 3)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("a", srgb), ("b", b"not a profile")):
        Image.fromarray(values).save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.array_equal(decode(tmp_path / f"{name}.png"), values.transpose(2, 0, 1))
    assert scan(tmp_path).notes == {
        "colour profile taken to sRGB": 1,
        "colour profile not readable, taken as sRGB": 1,
    }


def test_the_first_frame_of_an_animation_is_taken_and_reported(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert scan(tmp_path).notes == {"only the first frame taken": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(tmp_path, orientation):
    image, exif = Image.fromarray(noise(4, 6, 3)), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        right = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(decode(tmp_path / "a.png"), right.transpose(2, 0, 1))


def test_a_big_image_is_scaled_down_to_no_less_than_twice_what_is_asked(tmp_path, monkeypatch):
    ramp = np.broadcast_to(np.linspace(0, 255, 300).astype(np.uint8)[:, None], (300, 400))
    for kind, mode in (
        ("png", "RGBA"),
        ("png", "L"),
        ("jpg", "RGB"),
        ("png", "P"),
        ("png", "I;16"),
    ):
        image = (
            Image.fromarray(ramp.astype(np.uint16) * 257)
            if mode == "I;16"
            else Image.fromarray(ramp).convert(mode)
        )
        image.save(tmp_path / f"a.{kind}")
        monkeypatch.setattr("demerge.data.decode.BIG", BIG)
        whole = load_images(tmp_path, resolution=32, channels=1).images([0]).int()
        monkeypatch.setattr("demerge.data.decode.BIG", 1000)
        small = decode(tmp_path / f"a.{kind}", (32, 32))
        assert 64 <= small.shape[1] <= 130
        assert (
            load_images(tmp_path, resolution=32, channels=1).images([0]).int() - whole
        ).abs().max() <= 3
        (tmp_path / f"a.{kind}").unlink()


MEASURE = """
import resource, sys
from pathlib import Path
from demerge.data.decode import decode, read_header
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    read_header(path)
    decode(path, (64, 64))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    "kinds",
    [("jpg RGB",), pytest.param(("png L", "png RGBA", "png P"), marks=pytest.mark.slow)],
)
def test_64_megapixels_take_bounded_memory(tmp_path, kinds):
    """They took 1.5 to 2.1 GB."""
    paths = [tmp_path / f"a{i}.{kind.split()[0]}" for i, kind in enumerate(kinds)]
    for path, kind in zip(paths, kinds, strict=True):
        with Image.new(kind.split()[1], (8000, 8000)) as image:
            image.save(path, **({"compress_level": 1} if path.suffix == ".png" else {}))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 700


# -- splits, links, contents -----------------------------------------------------------------------


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(4, 4)).save(folder / name)


@pytest.mark.parametrize(
    "held", ["val", "validation", "valid", "test", "Val", "dev", "eval", "testing", "val2017"]
)
@pytest.mark.parametrize("below", [False, True])
def test_splits_are_not_classes_and_held_out_images_are_not_trained_on(tmp_path, held, below):
    names = [
        f"{split}/{name}/{i}.png"
        for split in ("train", held)
        for name in ("cat", "dog")
        for i in range(2)
    ]
    write(
        tmp_path,
        *(
            ["/".join([n.split("/")[1], n.split("/")[0], n.split("/")[2]]) for n in names]
            if below
            else names
        ),
    )
    for split, folder in (("train", "train"), ("test", held)):
        data = load_images(tmp_path, split=split)
        paths = [
            data.pixels.paths[position].relative_to(tmp_path).parts for position in data.positions
        ]
        assert len(paths) == 4
        assert all(folder in path for path in paths)
        assert data.labels == [int("dog" in path) for path in paths]


def test_validation_images_next_to_a_test_folder_are_in_neither_split(tmp_path):
    write(
        tmp_path,
        *(f"{split}/{name}/0.png" for split in ("train", "val", "test") for name in ("cat", "dog")),
    )
    for split in ("train", "test"):
        data = load_images(tmp_path, split=split)
        assert {data.pixels.paths[p].relative_to(tmp_path).parts[0] for p in data.positions} == {
            split
        }
    assert scan(tmp_path).splits == {"train": 2, "test": 2, "in neither": 2}
    assert len(load_images(tmp_path, split="all")) == 6


def test_splits_have_their_names_with_a_year_behind_them(tmp_path):
    write(
        tmp_path,
        *(f"{split}/{name}/0.png" for split in ("Train2017", "Val2017") for name in ("cat", "dog")),
    )
    assert scan(tmp_path).splits == {"train": 2, "test": 2}
    write(tmp_path, "extra/c.png")
    with pytest.raises(
        InputError, match=r"1 images are outside Train2017/ and Val2017/"
    ) as refused:
        load_images(tmp_path)
    assert refused.value.fix.endswith(f"{tmp_path}/Train2017")


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write(tmp_path, "cat/0.png", "dog/1.png")
    (tmp_path / "bird").symlink_to(tmp_path / "unmounted")
    assert (
        scan(tmp_path).broken == (("bird", "the link leads nowhere"),) and not scan(tmp_path).usable
    )
    with pytest.raises(InputError, match="bird: the link leads nowhere"):
        load_images(tmp_path)
    assert len(load_images(tmp_path, skip_broken=True, split="all")) == 2


def test_images_outside_of_the_splits_are_refused_by_name(tmp_path):
    write(tmp_path, "train/a.png", "val/b.png", "extra/c.png")
    with pytest.raises(InputError, match=r"1 images are outside train/ and val/: extra/c\.png"):
        load_images(tmp_path)
    assert not scan(tmp_path).usable


def test_a_folder_named_train_among_classes_is_a_class(tmp_path):
    write(tmp_path, "train/a.png", "bus/b.png", "car/c.png")
    assert load_images(tmp_path).labels == [0, 1, 2]


def test_linked_folders_are_followed_once_and_never_in_a_circle(tmp_path):
    write(tmp_path / "elsewhere", "1.png", "deep/2.png")
    write(tmp_path / "data", "cat/0.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    names = [
        path.relative_to(tmp_path / "data").as_posix()
        for path in list_folder(tmp_path / "data").images
    ]
    assert names == ["cat/0.png", "cat/gone.png", "dog/1.png", "dog/deep/2.png"]
    found = scan(tmp_path / "data")
    left = "left out, its folder is read already"
    assert found.links == {"dog": "followed", "again": left, "cat/up": left, "dog/self": left}
    assert [name for name, _ in found.broken] == ["cat/gone.png"]
    assert load_images(tmp_path / "data", skip_broken=True).labels == [0, 1, 1]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def refusing(place: Path) -> object:
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="closed: the folder cannot be read: Permission denied"):
        load_images(tmp_path)
    found = scan(tmp_path)
    assert found.broken == (("closed", "the folder cannot be read: Permission denied"),)
    assert not found.usable


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_with_the_name_of_an_image_does_not_hang(tmp_path):
    write(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert scan(tmp_path).broken == (("b.png", "not a regular file"),)


def test_a_changed_pixel_in_a_file_of_the_same_size_changes_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = np.full((128, 128, 3), 40, np.uint8)

    def fingerprint(age: float) -> str:
        Image.fromarray(values).save(tmp_path / "d" / "a.bmp")
        then = time.time() - age
        os.utime(tmp_path / "d" / "a.bmp", (then, then))
        return load_images(tmp_path / "d").fingerprint

    (tmp_path / "d").mkdir()
    before = fingerprint(100)
    assert fingerprint(100) == before
    values[64, 64] = 41
    assert fingerprint(50) != before
    values[64, 64] = 40
    assert fingerprint(30) == before


# -- captions --------------------------------------------------------------------------------------


def test_captions_from_jsonl_and_csv(tmp_path):
    for kind in ("jsonl", "csv"):
        names = [path.name for path in write_images(tmp_path / kind, 3)]
        rows = [{"file_name": name, "text": f'a "{name}", seen'} for name in names]
        jsonl = "".join(json.dumps(row) + "\n" for row in rows)
        table = "file_name,text\n" + "".join(f'{name},"a ""{name}"", seen"\n' for name in names)
        (tmp_path / kind / f"metadata.{kind}").write_text(jsonl if kind == "jsonl" else table)
        data = load_images(tmp_path / kind)
        assert data.captions == [f'a "{names[i]}", seen' for i in data.positions]
        assert scan(tmp_path / kind).captions == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "000.png", "text": "a"}\n', "1 of 2 images have no caption: 001.png"),
        ("not json\n", "line 1"),
        ('{"file_name": "000.png"}\n', "line 1"),
        ('{"file_name": "../000.png", "text": "a"}\n', "leads out"),
        ("[" * 5000, "line 1"),
    ],
)
def test_bad_captions_are_named(tmp_path, text, message):
    write_images(tmp_path, 2)
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        load_images(tmp_path)
    found = scan(tmp_path)
    assert found.readable == 2
    assert found.verdict != "usable"


def test_captions_next_to_the_images(tmp_path):
    paths = write_images(tmp_path / "a" / "deep", 3)
    for i, path in enumerate(paths):
        path.with_suffix(".txt" if i else ".caption").write_text(
            f" picture {i}\n", encoding="utf-8-sig"
        )
    (tmp_path / "a" / "README.txt").write_text("not a caption")
    data = load_images(tmp_path / "a")
    assert data.captions == ["picture 0", "picture 1", "picture 2"]
    found = scan(tmp_path / "a")
    assert (found.captions, found.usable, found.passed_over) == (3, True, {})
    paths[1].with_suffix(".txt").unlink()
    with pytest.raises(InputError, match=r"1 of 3 images have no caption: deep/001\.png"):
        load_images(tmp_path / "a")
    assert "1 of 3 images have no caption" in scan(tmp_path / "a").verdict


def test_the_captions_count_in_the_fingerprint(tmp_path):
    (path,) = write_images(tmp_path, 1)
    seen = set()
    for text in ("a", "b"):
        path.with_suffix(".txt").write_text(text)
        seen.add(load_images(tmp_path).fingerprint)
    assert len(seen) == 2


def test_two_different_captions_of_one_image_are_refused(tmp_path):
    (path,) = write_images(tmp_path, 1)
    path.with_suffix(".txt").write_text("a")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "b"}')
    with pytest.raises(
        InputError, match=r"metadata.jsonl, line 1: another caption of 000.png is in .*000.txt"
    ):
        load_images(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "./000.png", "text": "a"}')
    assert load_images(tmp_path).captions == ["a"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "txt"])
def test_names_match_in_any_unicode_form(tmp_path, forms, kind):
    image, other = (unicodedata.normalize(form, "café.png") for form in forms)
    write(tmp_path, image)
    if kind == "txt":
        (tmp_path / other).with_suffix(".txt").write_text("x")
    else:
        (tmp_path / kind).write_text(
            json.dumps({"file_name": other, "text": "x"}), encoding="utf-8"
        )
    assert load_images(tmp_path).captions == ["x"]


LONG = "x" * (129 << 10)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metadata.csv",
            'file_name,text\n000.png,a\n001.png,"5 inch\n',
            r"metadata\.csv, line 3: .*unexpected end of data",
        ),
        (
            "metadata.csv",
            f"file_name,text\n000.png,{LONG}\n",
            r"metadata\.csv, line 2: .*field larger than",
        ),
        ("metadata.csv", f'"{LONG}', r"metadata\.csv, line 1: "),
        (
            "metadata.csv",
            'file_name,text\n000.png,"a" b\n',
            r"metadata\.csv, line 2: .*expected after",
        ),
        (
            "metadata.jsonl",
            json.dumps({"file_name": "000.png", "text": LONG}),
            r"line 1: a caption of more than 128 KiB",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "000.png", "text": "\\ud800"}',
            r"line 1: half of a character",
        ),
        ("000.txt", LONG, r"000\.txt: a caption of more than 128 KiB"),
    ],
)
def test_damaged_captions_are_one_sentence_with_file_and_line(tmp_path, name, text, message):
    write_images(tmp_path, 2)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_images(tmp_path)
    assert "\n" not in caught.value.what
    found = scan(tmp_path)
    assert not found.usable
    assert found.complaint


# -- what goes wrong -------------------------------------------------------------------------------


def png(tmp_path: Path) -> bytes:
    Image.fromarray(noise(32, 32, 3)).save(tmp_path / "whole.png")
    return (tmp_path / "whole.png").read_bytes()


def jpeg(tmp_path: Path) -> bytes:
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.jpg")
    return (tmp_path / "whole.jpg").read_bytes()


def bomb(width: int, height: int) -> bytes:
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


BAD = {
    "empty.png": (lambda p: b"", "empty file"),
    "lfs.png": (
        lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "Git LFS pointer",
    ),
    "page.jpg": (lambda p: b"<!DOCTYPE html><html></html>", "web page"),
    "text.png": (lambda p: b"hello", "not an image"),
    "cut.png": (lambda p: png(p)[:-600], "truncated"),
    "cut.jpg": (lambda p: jpeg(p)[:-600], "truncated"),
    "head.png": (lambda p: png(p)[:20], "image"),
    "bomb.png": (lambda p: bomb(9000, 9000), "64 million pixels"),
    "big-bomb.png": (lambda p: bomb(60000, 60000), "64 million pixels"),
    "short.png": (lambda p: bomb(50, 50), "damaged|truncated"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_what_is_wrong(tmp_path, name):
    make, message = BAD[name]
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / name
    path.write_bytes(make(tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        decode(path)
    assert str(path) in caught.value.what
    assert caught.value.fix


def test_folder_with_broken_files_lists_them_and_can_skip_them(tmp_path):
    write_images(tmp_path, 20)
    for i in range(12):
        (tmp_path / f"broken{i:02}.png").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_images(tmp_path)
    text = str(caught.value)
    assert "12 of 32" in text
    assert "broken09.png" in text
    assert "broken10.png" not in text
    assert "and 2 more" in text
    assert "demerge data check" in text
    assert len(load_images(tmp_path, skip_broken=True)) == 20
    found = scan(tmp_path)
    assert (found.images, found.readable, len(found.broken)) == (32, 20, 12)
    assert found.broken[0] == ("broken00.png", "empty file")
    assert json.loads(json.dumps(found.document()))["splits"] == {"train": 18, "test": 2}


def test_every_truncation_and_mutation_is_an_input_error_or_an_image(tmp_path):
    whole, path = png(tmp_path), tmp_path / "x.png"
    for i in range(0, len(whole), 97):
        mutated = bytearray(whole)
        mutated[i] ^= 0xFF
        for raw in (whole[:i], bytes(mutated)):
            path.write_bytes(raw)
            try:
                read_header(path)
                decode(path)
            except InputError as error:
                assert "x.png" in error.what


def test_a_huge_text_chunk_is_no_traceback(tmp_path):
    info = PngInfo()
    info.add_text("comment", "a" * 3_000_000, zip=True)
    Image.new("L", (2, 2)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(InputError):
        decode(tmp_path / "x.png")


def _object_npz(path: Path) -> None:
    np.savez(path, images=np.array([{"a": 1}], dtype=object))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.npz", _object_npz, "not a readable npz"),
        ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04 nothing"), "not a readable npz"),
        ("a.npz", lambda p: np.savez(p, other=noise(2, 4, 4)), "no key"),
        ("a.npz", lambda p: np.savez(p, images=np.zeros((2, 4, 4))), "float64"),
        ("a.npz", lambda p: np.savez(p, images=noise(2, 4, 4, 4)), "channels"),
        ("a.npz", lambda p: np.savez(p, images=noise(2, 4, 4), labels=np.arange(3)), "labels"),
        ("a.bin", lambda p: p.write_bytes(b"\0" * 3000), "records"),
        ("a.bin", lambda p: p.write_bytes(b"\x0a" * 3073), "label 10"),
        ("a.bin", lambda p: p.write_bytes(b""), "records"),
        (
            "a-images-idx3-ubyte",
            lambda p: p.write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", 9, 9, 9)),
            "header says",
        ),
        ("a-images-idx3-ubyte", lambda p: p.write_bytes(b"nonsense"), "not an idx file"),
        ("a-images-idx3-ubyte.gz", lambda p: p.write_bytes(b"nonsense"), "cannot be read"),
        ("a.txt", lambda p: p.write_bytes(b"x"), "not a source"),
    ],
)
def test_bad_arrays_are_named(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        load_images(tmp_path / name)
    assert name in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(
    "arguments", [{"split": "dev"}, {"resolution": 0}, {"channels": 2}, {"limit": 0}]
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(UsageError):
        load_images("digits", **arguments)


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(InputError, match="neither a known name"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no image"):
        load_images(tmp_path)
    write_images(tmp_path, 1)
    with pytest.raises(DemergeError, match="empty"):
        load_images(tmp_path, split="test")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat/a.png", "cat/deep/b.png", "dog/a.png"], [0, 0, 1]),
        (["train/dog/a.png", "train/eel/a.png", "test/cat/a.png", "test/dog/b.png"], [0, 1, 1, 2]),
        (["2/a.png", "10/a.png"], [10, 2]),
        (["cat/a.png", "cat/b.png"], None),
        (["cat/a.png", "dog/a.png", "loose.png"], None),
        (["train/a.png", "test/a.png"], None),
    ],
)
def test_folders_are_classes(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(4, 4)).save(tmp_path / name)
    assert load_images(tmp_path, split="all").labels == expected


def test_a_broken_file_outside_of_the_splits_does_not_take_the_classes_away(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/dog/a.png", "val/dog/a.png")
    (tmp_path / "loose.png").write_bytes(b"")
    assert load_images(tmp_path, split="train", skip_broken=True).labels == [0, 1]


def test_a_broken_file_does_not_shift_the_classes(tmp_path):
    write_images(tmp_path / "b", 1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"")
    assert load_images(tmp_path, split="all", skip_broken=True).labels == [1]
