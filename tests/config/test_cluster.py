"""Profiles of clusters: composition and checks."""

from __future__ import annotations

import pytest

from torchrl_sql.config import ConfigError, list_choices
from torchrl_sql.config.cluster import (
    compose_cluster_config,
    override_cluster_config,
    split_overrides,
)


def test_a_shipped_profile():
    config = compose_cluster_config(["cluster=gpus32"])
    assert (config.nodes, config.gpus_per_node, config.tasks_per_node, config.num_tasks) == (4, 8, 8, 32)
    assert config.signal_delay_seconds == 120


@pytest.mark.parametrize("name", list_choices("cluster"))
def test_every_shipped_profile_composes(name):
    assert compose_cluster_config([f"cluster={name}"]).nodes >= 1


def test_one_process_per_gpu_follows_the_number_of_gpus():
    assert compose_cluster_config(["cluster=gpus8", "cluster.gpus_per_node=4"]).tasks_per_node == 4


def test_a_file_of_ones_own_replaces_base_values(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("partition: gpu\nenvironment: {NCCL_DEBUG: INFO}\nsetup: [module load cuda]\n")
    config = compose_cluster_config([f"cluster={file}", "cluster.timeout_minutes=30", "cluster.environment.A=1"])
    assert config.partition == "gpu" and config.timeout_minutes == 30 and config.max_crashes == 5
    assert config.environment == {"NCCL_DEBUG": "INFO", "A": "1"} and config.setup == ["module load cuda"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "cluster must be given once"),
        (["cluster=cpu", "cluster=gpus8"], "cluster must be given once"),
        (["cluster=nowhere"], "one of base, cpu, gpus1, gpus32, gpus8, got 'nowhere'"),
        (["cluster=absent.yaml"], "absent.yaml must be readable YAML"),
        (["cluster=cpu", "cluster.node=2"], "there is no setting 'cluster.node'; did you mean cluster.nodes"),
        (["cluster=cpu", "cluster.nodes=0"], "cluster.nodes must be at least 1, got 0"),
        (["cluster=cpu", "cluster.nodes=two"], "cluster.nodes must be a whole number, got 'two'"),
        (["cluster=cpu", "cluster.gpus_per_node=2"], "cluster.tasks_per_node must be cluster.gpus_per_node=2"),
        (["cluster=cpu", "cluster.memory=64 GB"], "cluster.memory must be null, or a number with K, M, G or T"),
        (["cluster=cpu", "cluster.timeout_minutes=2"], "less than cluster.timeout_minutes=2"),
        (["cluster=cpu", "cluster.environment={a-b: c}"], "names of variables, got 'a-b'"),
        (
            ["cluster=cpu", "cluster.timeout_minutes=24:00:00"],
            "cluster.timeout_minutes must be a whole number, got '24:00:00'",
        ),
        (["cluster=cpu", "cluster.timeout_minutes=1e3"], "cluster.timeout_minutes must be a whole number, got '1e3'"),
        (
            ["cluster=cpu", "cluster.setup=module load cuda"],
            "cluster.setup must be a list, written cluster.setup=[A,B]",
        ),
        (["cluster=cpu", "cluster.comment=a\nb"], "cluster.comment must be one line"),
        (["cluster=cpu", "cluster.sbatch.comment=a\nb"], "cluster.sbatch.comment must be one line"),
        (["cluster=cpu", "cluster.sbatch={x: [1]}"], "long options with one value each, got 'x'"),
    ],
)
def test_what_cannot_be_asked_for(overrides, message):
    with pytest.raises(ConfigError) as error:
        compose_cluster_config(overrides)
    assert message in str(error.value)


VALUES = {
    "account": "00123",
    "qos": "1e5",
    "comment": "it's # x",
    "constraint": "[rack1|rack2]&h100",
    "environment.OFFSET": "0755",
    "environment.DAY": "12:30:45",
    "environment.FLAG": "true",
    "environment.NOTHING": "null",
    "sbatch.gres": "gpu:h100:8",
    "sbatch.time": "1-00:00:00",
}
"""What YAML 1.1 would take for numbers, flags, lists and comments."""


@pytest.mark.parametrize("key", VALUES)
def test_a_value_is_what_was_written(key, tmp_path):
    value, (section, _, name) = VALUES[key], key.rpartition(".")

    def read(config):
        return getattr(config, section)[name] if section else getattr(config, name)

    file = tmp_path / "mine.yaml"
    text = value if not set(value) & set("#[:") else f'"{value}"'
    file.write_text(f"{section}: {{{name}: {text}}}\n" if section else f"{name}: {text}\n")
    assert read(compose_cluster_config([f"cluster={file}"])) == value
    quoted = f'"{value}"' if value.startswith("[") else value
    launched = compose_cluster_config(["cluster=cpu", f"cluster.{key}={quoted}"])
    assert read(launched) == value and override_cluster_config(launched, []) == launched


def test_times_of_a_file_are_refused_not_multiplied(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("timeout_minutes: 24:00:00\n")
    with pytest.raises(ConfigError, match=r"cluster.timeout_minutes must be a whole number, got '24:00:00'"):
        compose_cluster_config([f"cluster={file}"])


def test_null_is_nothing():
    config = compose_cluster_config(
        ["cluster=gpus8", "cluster.memory=null", "cluster.sbatch={gres: null, exclusive: true}"]
    )
    assert config.memory is None and config.sbatch == {"gres": None, "exclusive": True}


def test_a_launched_profile_can_be_changed():
    config = compose_cluster_config(["cluster=cpu"])
    assert override_cluster_config(config, ["cluster.timeout_minutes=7"]).timeout_minutes == 7
    assert override_cluster_config(config, []) == config
    with pytest.raises(ConfigError, match=r"settings here must be cluster.KEY=VALUE, got 'seed=1'"):
        override_cluster_config(config, ["seed=1"])


def test_settings_of_cluster_and_run_are_told_apart():
    words = ["seed=1", "cluster=cpu", "cluster.nodes=2", "name=cluster=x"]
    assert split_overrides(words) == (["cluster=cpu", "cluster.nodes=2"], ["seed=1", "name=cluster=x"])
