"""kdutils.data.images: ten classes, split with a seed; anything that is not ten readable classes is named."""

import http.client
import io
import os
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import message_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdutils.data import images
from kdutils.data.images import Split, load_data, read_image, read_image_folder, rotate_validation, stratified_split
from kdutils.settings import UserError, load_settings


@st.composite
def split_problems(draw):
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=10))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))]
    first = draw(st.integers(0, len(labels)))
    return labels, (first, draw(st.integers(0, len(labels) - first))), draw(st.integers(0, 2**31 - 1))


@settings(max_examples=150, deadline=None)
@given(split_problems())
def test_a_split_is_disjoint_exact_in_size_stratified_and_repeatable(problem):
    labels, sizes, seed = problem
    parts = stratified_split(labels, sizes, seed)
    together = torch.cat(parts).tolist()
    assert [len(part) for part in parts] == list(sizes) and len(set(together)) == len(together)
    for part, size in zip(parts, sizes):
        found = labels[part].bincount(minlength=int(labels.max()) + 1)
        exact = size * labels.bincount() / len(labels)
        assert (found - exact).abs().max() <= 1 + 1e-4
    assert all(torch.equal(*pair) for pair in zip(parts, stratified_split(labels, sizes, seed), strict=True))


def test_a_split_is_shuffled_depends_on_its_seed_and_leaves_other_random_numbers_alone():
    labels, state = torch.arange(10).repeat_interleave(20), torch.get_rng_state()
    one, other = (stratified_split(labels, (100, 20), seed) for seed in (0, 1))
    assert not torch.equal(labels[one[0]], labels[one[0]].sort().values)
    assert all(set(a.tolist()) != set(b.tolist()) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_sizes_larger_than_the_labels_are_named():
    message = message_of(stratified_split, torch.arange(10), (8, 3), 0, "train_size + val_size")
    assert message.startswith("train_size + val_size: ") and "11" in message and "10" in message and "lower" in message


CLASSES = [f"class{i}" for i in range(10)]


def write_images(root, classes, counts):
    """Images of random pixels in `root/<part>/<class>/`, `counts` of them for each part; returns `root`."""
    generator = np.random.default_rng(0)
    for part, count in counts.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "my ten", CLASSES, {"train": 4, "test": 2})


@pytest.fixture
def load(tiny, folder):
    sizes = {"train_size": 20, "val_size": 10, "test_size": 10}
    return lambda **overrides: load_data(tiny(**{"data": f"folder:{folder}", **sizes, **overrides}))


def pixels_of(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_a_folder_becomes_a_data_set(load, folder):
    data = load()
    assert data.classes == CLASSES and data.name == "my ten" and not data.is_generated
    assert data.facts["is_cifar10"] is False
    for part, size in (("train", 20), ("val", 10), ("test", 10)):
        images, labels = getattr(data, part)
        assert images.shape == (size, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == [size // 10] * 10
        source = "test" if part == "test" else "train"
        for image, label in zip(images, labels.tolist()):
            files = (folder / source / CLASSES[label]).iterdir()
            assert any(torch.equal(image, pixels_of(path)) for path in files)


def test_the_order_in_which_files_were_written_does_not_matter(load, folder):
    first = load(data_name="holiday pictures")
    for path in sorted(folder.rglob("*.png"), reverse=True):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert load().checksum == first.checksum and first.name == "holiday pictures"


def test_a_file_of_the_same_size_put_in_place_later_is_noticed(load, folder):
    for path in folder.rglob("class3/*.png"):
        Image.new("RGB", (32, 32), (9, 9, 9)).save(path.with_suffix(".bmp"))
        path.unlink()
    first = load()
    for path in folder.rglob("class3/*.bmp"):
        size = path.stat().st_size
        Image.new("RGB", (32, 32), (8, 8, 8)).save(path)
        assert path.stat().st_size == size
        os.utime(path, (2_000_000_000, 2_000_000_000))
    assert load().checksum != first.checksum


def test_other_files_are_ignored_and_named_but_for_those_that_systems_leave(load, folder, capsys):
    first = load()
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "readme.txt").write_text("x")
    (folder / "train" / "class0" / "Thumbs.db").write_text("x")
    (folder / "train" / "class0" / "._0.png").write_bytes(b"\0\5\x16\7")  # macOS
    assert load().checksum == first.checksum and "ignored" not in capsys.readouterr().out
    (folder / "train" / "class3" / "a.heic").touch()
    (folder / "train" / "class3" / "notes.txt").touch()
    assert load().checksum == first.checksum
    said = capsys.readouterr().out
    assert f"data: {folder / 'train'}: 2 files are not images by their names: ignored" in said and "a.heic" in said


@pytest.mark.parametrize("sizes", [{"train_size": 35, "val_size": 10}, {"test_size": 21}])
def test_sizes_larger_than_the_folder_are_named(load, sizes):
    message = message_of(load, **sizes)
    assert next(iter(sizes)) in message and "lower it" in message


def test_the_name_of_the_original_is_refused_for_other_images(load, tiny, folder):
    moved = folder.parent / "other" / "CIFAR-10"  # the name would be the folder's
    shutil.copytree(folder, moved)
    for call in (
        lambda: load(data_name="CIFAR-10"),
        lambda: load_data(tiny(data_name="CIFAR-10")),
        lambda: load(data=f"folder:{moved}"),
    ):
        message = message_of(call)
        assert message.startswith("data_name: 'CIFAR-10'") and "data = cifar10" in message


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    """A light grey picture stays light grey, whatever way its file stores it."""
    if mode == "I;16":
        image = Image.fromarray(np.full((32, 32), 200 * 257, dtype=np.uint16))
    else:
        image = Image.new("RGB", (32, 32), (200, 200, 200))
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    path = tmp_path / ("x.tiff" if mode in ("CMYK", "YCbCr") else "x.png")
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    if mode == "1":
        assert set(pixels.flatten().tolist()) <= {0, 255} and pixels.mean() > 127
    else:
        assert np.abs(pixels.astype(int) - 200).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """Whatever colour the file keeps under it; half transparent is half of it."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 128), (0, 0, 16, 32))
    if mode == "P":
        image = Image.new("P", (32, 32), 0)
        image.putpalette([255, 0, 0] + [0] * 765)
    image.convert(mode).save(tmp_path / "x.png", **({"transparency": 0} if mode == "P" else {}))
    pixels = read_image(tmp_path / "x.png")
    assert (pixels[:, 16:] == 255).all()
    assert (pixels[:, :16] == (255 if mode == "P" else 127)).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_a_moving_picture_the_first_frame_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(tmp_path / f"x.{kind.lower()}", save_all=True, append_images=frames[1:])
    assert np.abs(read_image(tmp_path / f"x.{kind.lower()}").astype(int) - (200, 0, 0)).max() <= 4


def test_links_out_of_the_folder_are_followed_and_named(load, folder, tmp_path, capsys):
    first = load()
    assert "link" not in capsys.readouterr().out
    (folder / "train" / "class3").rename(tmp_path / "elsewhere")
    (folder / "train" / "class3").symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "class4" / "0.png").rename(folder / "moved.png")
    (folder / "train" / "class4" / "0.png").symlink_to(folder / "moved.png")
    (folder / "train" / "class5" / "9.png").symlink_to(folder / "train" / "class5" / "1.png")  # stays within
    assert load(train_size=20).classes == first.classes
    said = capsys.readouterr().out
    assert f"data: {folder / 'train'}: 2 links lead out of it, for example " in said


@pytest.mark.parametrize("width, height", [(64, 64), (100, 40), (40, 100), (8, 8), (32, 33), (1, 1)])
def test_the_middle_of_any_size_is_taken(tmp_path, width, height):
    """Red left and right, blue above and below a green middle square: what is not square loses its longer ends."""
    side = min(width, height)
    image = Image.new("RGB", (width, height), (255, 0, 0) if width > height else (0, 0, 255))
    image.paste((0, 255, 0), ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
    image.save(tmp_path / "x.png")
    pixels = read_image(tmp_path / "x.png")
    assert pixels.shape == (32, 32, 3)
    assert (pixels[4:28, 4:28] == (0, 255, 0)).all()


def test_the_orientation_that_a_camera_noted_is_used(tmp_path):
    image = Image.new("RGB", (32, 32), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 32, 8))  # a white band on top
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image.rotate(180).save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png")[2, 16, 0] == 255


def encoded(kind):
    file = io.BytesIO()
    gradient = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) % 251
    Image.fromarray(gradient.astype(np.uint8)).save(file, format=kind)
    return file.getvalue()


ENCODED = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged TIFF
@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(ENCODED)), data=st.data())
def test_no_damage_to_a_file_ends_in_a_traceback(tmp_path_factory, kind, data):
    good = ENCODED[kind]
    content = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    path.write_bytes(content)
    try:
        assert read_image(path).shape == (32, 32, 3)
    except UserError as error:
        assert path.name in str(error)


NO_NETWORK = [urllib.error.URLError("Name or service not known"), TimeoutError("timed out")]
NO_NETWORK += [ConnectionResetError("reset"), http.client.IncompleteRead(b""), http.client.RemoteDisconnected("closed")]


@pytest.mark.parametrize("error", NO_NETWORK, ids=lambda error: type(error).__name__)
def test_cifar10_without_a_network(tiny, tmp_path, monkeypatch, error):
    def urlopen(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    folder = tmp_path / "downloads"
    message = message_of(load_data, tiny(data="cifar10", data_dir=str(folder)))
    assert message.startswith("data: CIFAR-10 ") and str(folder) in message
    assert "cifar-10-python.tar.gz" in message and "data = shapes10" in message and "folder:PATH" in message


@pytest.fixture
def fake_cifar10(monkeypatch):
    """torchvision's CIFAR10 with 60 and 20 images, as if found in its folder; the folders it was asked for."""
    import torchvision

    asked = []

    class CIFAR10:
        classes = CLASSES

        def __init__(self, root, train, download):
            asked.append((root, train))
            count = 60 if train else 20
            rows = np.arange(32, dtype=np.uint8)[:, None, None]
            self.data = np.broadcast_to(rows, (count, 32, 32, 3)).copy()
            self.targets = [i % 10 for i in range(count)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    return asked


@pytest.mark.parametrize("name", [None, "CIFAR-10, 9,000 of 50,000"])
def test_cifar10_found_in_its_folder_by_any_name(tiny, tmp_path, fake_cifar10, name):
    data = load_data(tiny(data="cifar10", data_dir=str(tmp_path / "here"), data_name=name))
    assert fake_cifar10 == [(str(tmp_path / "here"), True), (str(tmp_path / "here"), False)]
    assert data.name == (name or "CIFAR-10") and data.facts["is_cifar10"] and data.classes == CLASSES
    assert data.train.images.shape == (40, 3, 32, 32)
    assert data.train.images[0, 0, :, 5].tolist() == list(range(32))  # rows stay rows
    assert data.train.labels.bincount().tolist() == [4] * 10


def test_shapes10_is_the_same_every_time(tiny):
    one, other = load_data(tiny()), load_data(tiny())
    assert one.checksum == other.checksum and one.is_generated and len(one.classes) == 10
    assert load_data(tiny(split_seed=1)).checksum != one.checksum
    assert one.train.labels.bincount().tolist() == [4] * 10


# Unlabelled images


def distinct(*splits):
    """All images of these parts as a set, after a check that no image is there twice."""
    images = [tuple(image.flatten().tolist()) for split in splits for image in split.images]
    assert len(set(images)) == len(images)
    return set(images)


def write_unlabelled(folder, *names, seed=1):
    """Images of random pixels: `folder/unlabelled/<name>`; returns their paths."""
    generator = np.random.default_rng(seed)
    paths = [folder / "unlabelled" / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("data", ["shapes10", "folder"])
@pytest.mark.parametrize("size", [0, 7, 10])
def test_unlabelled_images_are_in_no_other_part_and_their_labels_are_hidden(load, data, size):
    """Of the folder's 40 training images 10 are left. The other parts are those of a data set without them."""
    data = {} if data == "folder" else {"data": "shapes10"}
    dataset, without = load(unlabelled_size=size, **data), load(unlabelled_size=0, **data)
    assert len(distinct(dataset.train, dataset.val, dataset.test, dataset.unlabelled)) == 40 + size
    assert dataset.unlabelled.labels.tolist() == [-1] * size and dataset.facts["unlabelled"] == size
    for part in ("train", "val", "test"):
        assert all(torch.equal(*pair) for pair in zip(getattr(dataset, part), getattr(without, part), strict=True))
        assert dataset.part_checksums[part] == without.part_checksums[part]
    assert dataset.checksum == without.checksum
    if not size:
        assert (
            dataset.hidden_labels is None and dataset.all_labelled is None and dataset.with_unlabelled is dataset.train
        )
        return
    assert dataset.part_checksums["unlabelled"] != without.part_checksums["unlabelled"]
    assert dataset.hidden_labels.bincount(minlength=10).max() == 1
    images = torch.cat([dataset.train.images, dataset.unlabelled.images])
    for part, labels in (("with_unlabelled", dataset.unlabelled.labels), ("all_labelled", dataset.hidden_labels)):
        found = getattr(dataset, part)
        assert torch.equal(found.images, images) and torch.equal(
            found.labels, torch.cat([dataset.train.labels, labels])
        )


def test_hidden_labels_are_the_images_own(load, folder):
    dataset = load(unlabelled_size=10)
    for image, label in zip(dataset.unlabelled.images, dataset.hidden_labels.tolist()):
        assert any(torch.equal(image, pixels_of(path)) for path in (folder / "train" / CLASSES[label]).iterdir())


def test_without_a_number_all_that_are_left_are_unlabelled(load, tiny_profile, folder, capsys):
    profile = tiny_profile(unlabelled_size=None, data=f"folder:{folder}", train_size=20, val_size=10)
    assert len(load_data(load_settings(profile)).unlabelled.labels) == 10
    assert "unlabelled" not in capsys.readouterr().out
    none = load_data(load_settings(profile, val_size=20))
    assert len(none.unlabelled.labels) == 0 and none.with_unlabelled is none.train
    assert capsys.readouterr().out == "data: the split leaves no training images: there are no unlabelled images\n"
    write_unlabelled(folder, "a.png", "b.png")
    assert len(load_data(load_settings(profile, val_size=20)).unlabelled.labels) == 2


def test_cifar10s_unlabelled_images_are_the_rest_of_its_training_part(tiny, monkeypatch):
    """50 of 60 images are drawn for training and validation."""
    numbered = torch.arange(80, dtype=torch.uint8)[:, None, None, None].expand(80, 3, 32, 32).contiguous()
    parts = [Split(numbered[:60], torch.arange(60) % 10), Split(numbered[60:], torch.arange(20) % 10)]
    monkeypatch.setattr(images, "_cifar10", lambda folder: (CLASSES, *parts))
    dataset = load_data(tiny(data="cifar10", unlabelled_size=10))
    number = dataset.unlabelled.images[:, 0, 0, 0].long()
    assert len(distinct(dataset.train, dataset.val, dataset.unlabelled)) == 60
    assert torch.equal(dataset.hidden_labels, number % 10) and dataset.hidden_labels.sort().values.tolist() == [
        *range(10)
    ]


def test_a_folders_own_unlabelled_images_are_taken_from_it_and_the_folders_in_it(load, folder, capsys):
    paths = write_unlabelled(folder, "a.png", "b.png", "trip/c.png", "trip/d.png", "class3/e.png")
    (folder / "unlabelled" / ".hidden").mkdir()
    dataset = load(unlabelled_size=5)
    assert "ignored" not in capsys.readouterr().out
    assert distinct(dataset.unlabelled) == distinct(Split(torch.stack([pixels_of(path) for path in paths]), None))
    assert dataset.unlabelled.labels.tolist() == [-1] * 5 and dataset.hidden_labels is None is dataset.all_labelled
    assert len(dataset.with_unlabelled.labels) == 25
    fewer = load(unlabelled_size=3).unlabelled
    assert distinct(fewer) < distinct(dataset.unlabelled) and len(fewer.labels) == 3
    assert not torch.equal(fewer.images, load(unlabelled_size=3, split_seed=1).unlabelled.images)


def test_other_files_among_unlabelled_images_are_ignored_and_named(load, folder, capsys):
    write_unlabelled(folder, "a.png", "trip/b.png")
    for name in ("notes.txt", "trip/film.mp4"):
        (folder / "unlabelled" / name).touch()
    (folder / "unlabelled" / "trip" / "deeper").mkdir()
    assert len(load(unlabelled_size=2).unlabelled.labels) == 2
    said = capsys.readouterr().out
    assert f"data: {folder / 'unlabelled'}: 3 files are not images by their names: ignored, for example " in said


def test_a_folders_unlabelled_images_are_decoded_once_and_apart_from_the_others(load, folder, monkeypatch):
    """And not at all where none are asked for."""
    (path,) = write_unlabelled(folder, "a.png")
    first, opened, real = load(unlabelled_size=1), [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file.name) or real(file))
    again = load(unlabelled_size=1)
    assert opened == [] and torch.equal(again.unlabelled.images, first.unlabelled.images)
    write_unlabelled(folder, "a.png", seed=2)
    os.utime(path, (2_000_000_000, 2_000_000_000))
    assert not torch.equal(load(unlabelled_size=1).unlabelled.images, first.unlabelled.images) and opened == ["a.png"]
    path.write_bytes(b"no image")
    assert len(load(unlabelled_size=0).unlabelled.labels) == 0


def test_other_validation_images_leave_the_unlabelled_ones(load):
    dataset = load(unlabelled_size=10)
    rotated = rotate_validation(dataset, 1)
    assert rotated.checksum != dataset.checksum == load(unlabelled_size=0).checksum
    assert rotated.checksum == rotate_validation(load(unlabelled_size=0), 1).checksum
    assert len(distinct(rotated.train, rotated.val, rotated.unlabelled)) == 40
    assert rotated.unlabelled is dataset.unlabelled and rotated.hidden_labels is dataset.hidden_labels


@pytest.mark.parametrize("into", ["unlabelled/x.bmp", "unlabelled/trip/x.bmp"])
def test_an_unlabelled_image_that_is_tested_is_an_error_whatever_its_file_is_called(load, folder, into):
    write_unlabelled(folder, "a.png")
    (folder / into).parent.mkdir(exist_ok=True)
    Image.open(folder / "test" / "class7" / "1.png").save(folder / into)
    assert message_of(load, test_size=20, unlabelled_size=2) == (
        "data: 1 of the 2 unlabelled images are test images, too (equal pixels), for example "
        f"{folder / into}; remove them from one of the two, or use unlabelled_size = 0"
    )
    assert len(load(test_size=20, unlabelled_size=0).unlabelled.labels) == 0


def test_an_image_that_the_split_leaves_and_that_is_tested_is_an_error_too(load, folder):
    for number in range(4):  # the one of this class that is left is one of these
        (folder / "train" / "class7" / f"{number}.png").unlink()
        Image.open(folder / "test" / "class7" / "1.png").save(folder / "train" / "class7" / f"{number}.bmp")
    message = message_of(load, test_size=20, unlabelled_size=10)
    assert message.startswith("data: 1 of the 10 unlabelled images are test images, too (equal pixels), for example ")
    assert (
        f"{folder / 'train' / 'class7'}{os.sep}" in message and ".bmp; remove them from one of the two, or" in message
    )


KINDS = ["ant", "bee", "cow"]


@pytest.fixture
def pictures(tmp_path):
    return write_images(tmp_path / "pictures", KINDS, {"train": 3, "val": 2})


@pytest.fixture
def read(pictures, tmp_path):
    return lambda parts=("train", "val"), size=32, **named: read_image_folder(
        pictures, parts, size, tmp_path / "cache", **named
    )


def test_any_number_of_classes_in_any_parts_and_size(read, pictures):
    classes, parts = read()
    assert classes == KINDS and list(parts) == ["train", "val"]
    for part, count in (("train", 3), ("val", 2)):
        images, labels = parts[part]
        assert images.shape == (3 * count, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.tolist() == [label for label in range(3) for _ in range(count)]
        files = [pictures / part / name / f"{i}.png" for name in KINDS for i in range(count)]
        for image, path in zip(images, files, strict=True):
            assert torch.equal(image, pixels_of(path))
    classes, parts = read(("val",), size=7)
    assert classes == KINDS and list(parts) == ["val"] and parts["val"].images.shape == (6, 3, 7, 7)


def test_a_folder_is_decoded_once_for_each_size(read, pictures, monkeypatch):
    first = read()[1]
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded again"))
    again = read()[1]
    assert all(torch.equal(again[part].images, first[part].images) for part in first)
    assert all(torch.equal(again[part].labels, first[part].labels) for part in first)
    monkeypatch.setattr(Image, "open", real)
    assert read(size=12)[1]["train"].images.shape == (9, 3, 12, 12)
    (pictures / "val" / "cow" / "1.png").unlink()
    assert len(read()[1]["val"].labels) == 5
    (pictures / "train" / "bee" / "0.png").rename(pictures / "train" / "cow" / "9.png")
    assert read()[1]["train"].labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_parts_with_other_classes_are_named(read, pictures):
    (pictures / "val" / "bee").rename(pictures / "val" / "cat")
    message = message_of(read)
    assert message.startswith("data: ") and "train and val" in message and str(pictures) in message
    assert "same class folders" in message and "bee" in message and "cat" in message and "ant" not in message
    assert read(("train",))[0] == KINDS


def test_a_number_of_classes_can_be_asked_for(read):
    assert read(num_classes=3)[0] == KINDS
    message = message_of(read, num_classes=4)
    assert "holds 3 class folders" in message and "must hold 4" in message


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_part_an_empty_class_and_an_unreadable_image_are_named(read, pictures, tmp_path, part):
    path = pictures / part / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:100])

    def assert_named(culprit, words):
        message = message_of(read)
        assert message.startswith("data: ") and str(culprit) in message and words in message

    assert_named(path, "fix or remove it")
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []  # nothing is half read
    path.unlink()
    path.symlink_to("nowhere.png")
    assert_named(path, "fix or remove it")
    for picture in path.parent.glob("*.png"):
        picture.unlink()
    (path.parent / "0.txt").touch()
    assert_named(path.parent, "holds no images")
    (pictures / part).rename(pictures / "elsewhere")
    assert_named(pictures / part, "there is no folder")
