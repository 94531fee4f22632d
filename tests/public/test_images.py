"""Image files of every kind, as a network takes them."""

import warnings

import pytest
import torch

from cvkernels import images
from cvkernels.images import Preparation, UnreadableImage, files_of, read
from cvkernels.memory_use import peak_memory

image = pytest.importorskip("PIL.Image")


def picture(width=80, height=60, mode="RGB"):
    """A gradient to the right in red and one down in green."""
    red = image.linear_gradient("L").rotate(90).resize((width, height))
    green = image.linear_gradient("L").resize((width, height))
    return image.merge("RGB", (red, green, image.new("L", (width, height), 40))).convert(mode)


def largest_difference(one, other):
    assert one.mode == other.mode == "RGB" and one.size == other.size
    found, expected = (
        torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).int() for i in (one, other)
    )
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("size", [(500, 375), (333, 640), (224, 224), (31, 400)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_prepared_as_torchvision_does(size, interpolation):
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(interpolation)
    steps = [transforms.Resize(256, interpolation=mode), transforms.CenterCrop(224)]
    steps += [transforms.ToTensor(), transforms.Normalize(images.MEAN, images.STD)]
    noise = image.effect_noise(size, 80).convert("RGB")
    ours = Preparation(interpolation=interpolation)(noise)
    torch.testing.assert_close(ours, transforms.Compose(steps)(noise), rtol=0, atol=1e-6)


def test_a_very_long_image():
    found = Preparation()(picture(20_000, 30))
    assert found.shape == (3, 224, 224) and found.isfinite().all()


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [("a.png", "RGB", 0), ("a.png", "RGBA", 0), ("a.jpg", "CMYK", 12), ("a.gif", "P", 60),
     ("a.png", "P", 60), ("a.tif", "RGB", 0), ("a.webp", "RGB", 40)],
)  # fmt: skip
def test_kinds_of_files(name, mode, tolerance, tmp_path):
    picture(mode=mode).save(tmp_path / name)
    assert largest_difference(read(tmp_path / name), picture()) <= tolerance


def test_grayscale_and_sixteen_bits_agree(tmp_path):
    numpy = pytest.importorskip("numpy")
    gray = picture(mode="L")
    gray.putpixel((0, 0), 255)
    gray.save(tmp_path / "8.png")
    deep = numpy.asarray(gray).astype(numpy.uint16) * 257
    image.fromarray(deep).save(tmp_path / "16.png")
    image.fromarray(deep.astype(numpy.float32)).save(tmp_path / "float.tif")
    eight = read(tmp_path / "8.png")
    assert largest_difference(eight, gray.convert("RGB")) == 0
    assert largest_difference(read(tmp_path / "16.png"), eight) == 0
    assert largest_difference(read(tmp_path / "float.tif"), eight) <= 1


def test_a_palette_with_transparency_says_nothing(tmp_path):
    flat = picture(mode="P")
    flat.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "a.png").size == flat.size


def test_large_images_are_reduced_before_they_are_converted(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGE", 4000)
    for mode, name in (("RGB", "a.png"), ("L", "b.png"), ("P", "c.gif"), ("CMYK", "d.tif")):
        picture(800, 600, mode).save(tmp_path / name)
        small = read(tmp_path / name, 30).resize((80, 60))
        assert largest_difference(small, picture(mode=mode).convert("RGB")) <= 60
        whole = read(tmp_path / name)
        assert whole.size == (800, 600) and small.mode == whole.mode == "RGB"
    assert read(tmp_path / "a.png", 30).size == (80, 60)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_turned_as_exif_says(ending, tmp_path):
    exif = image.Exif()
    exif[images.ORIENTATION] = 6  # to be turned right
    options = {} if ending != "jpg" else {"quality": 95, "subsampling": 0}
    path = tmp_path / f"a.{ending}"
    picture().rotate(90, expand=True).save(path, exif=exif, **options)
    assert largest_difference(read(path), picture()) <= (12 if ending == "jpg" else 0)


def test_a_panorama_takes_little_memory(tmp_path):
    """100 million pixels, which pillow warns of; decoded whole they are 400 MB."""
    path = tmp_path / "wide.jpg"
    image.new("L", (20_000, 5_000), 90).save(path)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peak = peak_memory(lambda: found.append(read(path, 256)), torch.device("cpu"))
    assert min(found[0].size) >= 512 and not peak > 60e6  # NaN where nothing tells
    assert Preparation()(found[0]).shape == (3, 224, 224)
    assert image.MAX_IMAGE_PIXELS is not None


def test_what_would_take_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST", 4000)
    picture().save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match=r"a.png: 80 x 60 pixels, more than 4,000"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"", "no image"), (b"words", "no image"), (None, "No such file"), ("cut", "truncated")],
)
def test_unreadable_files_are_named(content, cause, tmp_path):
    path = tmp_path / "bad.jpg"
    if content == "cut":
        picture().save(path)
        content = path.read_bytes()[:700]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=f"bad.jpg: .*{cause}"):
        read(path)


def test_files_of_folders_patterns_and_names(tmp_path):
    for name in ("b.png", "a.jpg", "deep/c.GIF", "deep/notes.txt", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    everything = [tmp_path / name for name in ("a.jpg", "b.png", "deep/c.GIF")]
    assert files_of([str(tmp_path)]) == everything
    assert files_of([str(tmp_path / "b.png"), str(tmp_path)])[0] == tmp_path / "b.png"
    assert files_of([str(tmp_path / "*.???")]) == everything[:2]
    assert files_of([str(tmp_path / "deep/notes.txt")]) == [tmp_path / "deep/notes.txt"]
    for word, message in (("empty", "holds no images"), ("x*", "no file, no folder")):
        with pytest.raises(ValueError, match=message):
            files_of([str(tmp_path / word)])
