"""Settings that no source can work with."""

import pytest

from rcnn.config import PipelineConfig
from rcnn.errors import ConfigError, RcnnError
from tests.data.broken.scene import Settings, check_message

SETTINGS: dict[str, tuple[Settings, tuple[str, ...]]] = {
    "image size of a source that has one": (
        {"data.source": "mnist", "data.image_size": 32},
        ("data.image_size = 32", "mnist"),
    ),
    "folder without root": ({"data.source": "folder"}, ("'folder'", "data.root")),
    "parquet without root": ({"data.source": "parquet"}, ("'parquet'", "data.root")),
    "name with a slash": ({"data.name": "a/b"}, ("data.name", "'a/b'")),
    "name of two lines": ({"data.name": "a\nb"}, ("data.name", "a\\nb")),
    "name that leads out": ({"data.name": "../a"}, ("data.name", "'../a'")),
    "source that is not known": ({"data.source": "imagenet"}, ("data.source", "'imagenet'")),
    "huge images": ({"data.image_size": 513}, ("data.image_size", "513")),
    "negative images": ({"data.image_size": -1}, ("data.image_size", "-1")),
    "image size that is no number": ({"data.image_size": "8x8"}, ("data.image_size", "'8x8'")),
    "more pixels than Pillow takes": ({"data.max_megapixels": 1000}, ("data.max_megapixels", "1000")),
    "no rows to test by": ({"data.test_fraction": 0.0}, ("data.test_fraction", "0.0")),
    "no rows to learn from": ({"data.test_fraction": 1.0}, ("data.test_fraction", "1.0")),
    "bad images that are mended": ({"data.on_error": "mend"}, ("data.on_error", "'mend'")),
    "root that is no text": ({"data.source": "folder", "data.root": ["a", "b"]}, ("data.root", "['a', 'b']")),
    "setting that is not there": ({"data.rot": "images"}, ("'data.rot'", "'data.root'")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_work_is_named(name: str) -> None:
    settings, words = SETTINGS[name]
    with pytest.raises(RcnnError) as caught:
        PipelineConfig().with_settings(settings)
    assert type(caught.value) is ConfigError
    check_message(caught.value, words)
