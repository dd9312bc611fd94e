"""Options of the stages of the HER2 status: methods, encoders, weights."""

import typing

import pytest

from hemera.config import METHODS, AggregateOptions, EmbedOptions, load
from hemera.config.status import Method
from hemera.errors import ConfigError


def test_every_route_is_a_method():
    assert set(typing.get_args(Method)) == set(METHODS)


def test_methods_have_the_options_of_the_section_but_for_their_own():
    config = load(
        {
            "sheet": "x.tsv",
            "aggregate": {"encoder": "virchow2", "epochs": 7, "seeds": 1},
            "evaluate_status": {"routes": ["foundation", "statistics_abmil"]},
        }
    )
    methods = config.methods
    # The floor is always there, and first.
    assert list(methods) == ["floor", "foundation", "statistics_abmil"]
    assert {name: (own.encoder, own.aggregator) for name, own in methods.items()} == {
        "floor": ("statistics", "mean"),
        "foundation": ("virchow2", "abmil"),
        "statistics_abmil": ("statistics", "abmil"),
    }
    assert {own.epochs for own in methods.values()} == {7}
    assert config.encoders == ("statistics", "virchow2")
    assert "--encoder statistics" in config.method_flags("floor")


def test_oliveira_has_its_own_values_where_the_configuration_sets_none():
    routes = {"routes": ["oliveira", "statistics_abmil"]}
    given = {"sheet": "x.tsv", "evaluate_status": routes}
    config = load(given)
    own, other = (config.methods[name] for name in routes["routes"])
    assert (own.encoder, own.aggregator, own.encoder_cases) == (
        "her2_cnn", "top_scores", "train_only",
    )  # fmt: skip
    assert (own.epochs, own.learning_rate, own.bags_per_step, own.select) == (
        150, 1e-5, 1, "accuracy",
    )  # fmt: skip
    assert (other.epochs, other.select, other.encoder_cases) == (50, "loss", "refuse")
    assert config.encoders == ("statistics", "her2_cnn")
    own = load({**given, "aggregate": {"epochs": 9, "encoder": "uni"}}).methods["oliveira"]
    assert (own.epochs, own.bags_per_step, own.encoder) == (9, 1, "her2_cnn")
    with pytest.raises(ConfigError, match=r"train_encoder\.split: 4, and embed\.split is 2"):
        load({**given, "train_encoder": {"split": 4}})


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("embed", {"weights": ["uni2_h"]}, ["embed.weights", "NAME=PATH"]),
        ("embed", {"weights": ["UNI=x"]}, ["embed.weights", "lower-case"]),
        ("embed", {"weights": ["a=x", "a=y"]}, ["embed.weights", "once"]),
        ("embed", {"weights": ["her2_cnn=x"]}, ["her2_cnn", "another name"]),
        ("evaluate_status", {"routes": ["other"]}, ["evaluate_status.routes", "'floor'"]),
        ("evaluate_status", {"routes": ["floor", "floor"]}, ["routes", "once"]),
        ("aggregate", {"encoder": "UNI 2"}, ["aggregate.encoder"]),
        ("train_encoder", {"weights": ["her2_cnn=x"]}, ["her2_cnn", "random weights"]),
        ("aggregate", {"encoder": "oyelade"}, ["aggregator abmil", "routes instead"]),
        ("aggregate", {"aggregator": "fused"}, ["encoder uni2_h", "routes instead"]),
        ("cases", {"folds": 1}, ["cases.folds", "at least 2"]),
    ],
)
def test_impossible_values_are_errors(section, values, words):
    with pytest.raises(ConfigError) as caught:
        load({"sheet": "x.tsv", section: values})
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_an_encoder_lacks(tmp_path):
    (tmp_path / "w").touch()
    options = EmbedOptions(weights=(f"mine={tmp_path / 'w'}", "gone=nowhere"))
    assert options.missing("statistics") == options.missing("mine") == []
    assert "nowhere, of encoder gone, does not exist" in options.missing("gone")[0]
    assert "no weights of encoder uni" in options.missing("uni")[0]


def test_networks_have_their_own_values_where_the_configuration_sets_none():
    routes = {"evaluate_status": {"routes": ["oyelade"]}, "sheet": "x.tsv"}
    options = load(routes).stages["train_encoder"]
    found = {name: options.of_network(name) for name in ("her2_cnn", "tumour", "stain_map")}
    assert [own.epochs for own in found.values()] == [200, 20, 50]
    assert [own.learning_rate for own in found.values()] == [1e-5, 2e-4, 5e-5]
    assert [own.weight_decay for own in found.values()] == [0, 0.01, 0.01]
    assert [own.balance for own in found.values()] == [True, False, False]
    config = load({**routes, "train_encoder": {"epochs": 7}})
    assert "--epochs 7" in config.network_flags("stain_map")
    assert config.encoders == ("statistics", "tumour", "stain", "stain_map")
    found = load({**routes, "aggregate": {"tumour_min": 0.0, "fusion": "map"}}).encoders
    assert found == ("statistics", "stain_map")
    with pytest.raises(ConfigError, match=r"held_out_folds: 5, and cases\.folds is 5"):
        load({**routes, "train_encoder": {"held_out_folds": 5}})


def test_views_have_to_fit_the_networks():
    given = {"sheet": "x.tsv", "evaluate_status": {"routes": ["segmentation"]}}
    sizes = {"embed": {"split": 4}, "tile": {"size_px": 512}}
    with pytest.raises(ConfigError, match=r"views of 128 px, and segmenter needs a multiple of"):
        load({**given, **sizes})
    given["evaluate_status"] = {"routes": ["oyelade"]}
    sizes = {"embed": {"split": 5}, "train_encoder": {"split": 5}, "tile": {"size_px": 512}}
    with pytest.raises(ConfigError, match=r"views of 102 px, and stain_map needs a multiple of 32"):
        load({**given, **sizes})
    load({**given, **sizes, "train_encoder": {"split": 5, "map_px": 96}})


def test_a_rule_has_no_other_encoder():
    with pytest.raises(ConfigError, match="nothing else does"):
        AggregateOptions(encoder="cells", aggregator="fused")
