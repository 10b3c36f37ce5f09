"""The configuration file: published defaults, clear refusals."""

import pytest

from spd.config import load_config, parse_config
from spd.errors import InputError

LEAST = {"model": "m", "tasks": ["gsm8k"]}


def test_defaults_are_the_published_settings():
    config = parse_config(LEAST)
    assert config.calibration.layers == "paper"
    assert (config.calibration.rank, config.calibration.max_length) == ("half", 256)
    assert (config.generation.temperature, config.generation.top_p) == (0.7, 0.9)
    assert (config.training.learning_rate, config.training.epochs, config.training.batch_size) == (1e-5, 5, 4)
    assert config.seed == config.training.seed == 42
    assert config.evaluated == ["gsm8k"]


def test_one_seed_for_all_unless_training_has_its_own():
    assert parse_config(LEAST | {"seed": 7}).training.seed == 7
    assert parse_config(LEAST | {"seed": 7, "training": {"seed": 8}}).training.seed == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'"),
        ({"training": {"learning_rat": 1e-4}}, "unknown key 'training.learning_rat'; did you mean 'learning_rate'"),
        ({"calibration": {"ranks": "half"}}, "did you mean 'rank'"),
        ({"generation": {"zzz": 1}}, "the keys there are prompts, temperature"),
        ({"training": {"epochs": 0}}, "epochs"),
        ({"training": {"learning_rate": "fast"}}, "learning_rate"),
        ({"generation": {"top_p": 1.5}}, r"generation\.top_p.*1\.5"),
        ({"generation": {"temperature": True}}, r"generation\.temperature"),
        ({"calibration": {"rank": "quarter"}}, "quarter"),
        ({"calibration": {"layers": "some"}}, r"calibration\.layers"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["gsm8k", "gsm8k"]}, "named twice"),
        ({"dtype": "int8"}, "dtype"),
        ({"seed": -1}, "seed"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        parse_config(LEAST | changes)


@pytest.mark.parametrize("missing", ["model", "tasks"])
def test_required_keys(missing):
    with pytest.raises(InputError, match=f"'{missing}' is required"):
        parse_config({key: value for key, value in LEAST.items() if key != missing})


def test_the_file_itself(tmp_path):
    with pytest.raises(InputError, match="no file"):
        load_config(tmp_path / "none.toml")
    path = tmp_path / "run.toml"
    path.write_text("model = ")
    with pytest.raises(InputError, match="not a TOML file"):
        load_config(path)
    (tmp_path / "here").mkdir()
    path.write_text('model = "here"\ndata = "elsewhere"\ntasks = ["gsm8k"]\n')
    config = load_config(path)
    assert config.model == str((tmp_path / "here").resolve()), "a folder beside the file"
    assert config.data == "elsewhere", "left alone where there is no such folder"
