"""Seeded configuration mistakes, each located with its fix; layering, conditions, round trip."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from fastsd.config import Config, ConfigError, dump_toml, for_condition, load_config
from fastsd.config.schema import deep_merge, leaves

EXAMPLES = ROOT / "examples"
TASK = '[model]\nname = "m"\n[data]\ntask = "chain_sum"\n'
ROWS = 'condition = "reference"\n[model]\nname = "m"\n[data]\ntrain = "a.jsonl"\neval = "b.jsonl"\n'

SERVER = TASK + '[critic]\nkind = "server"\nmodel = "m"\n'

# (TOML, flags, where it must be said to be, dotted key, words of the fix)
MISTAKES = [
    # Unknown keys.
    ('conditon = "all"\n' + TASK, [], "c.toml:1", "conditon", 'did you mean "condition"'),
    (TASK + "[optim]\n\nstep = 3\n", [], "c.toml:7", "optim.step", 'did you mean "optim.steps"'),
    (TASK + "[optim]\nrollout = 3\n", [], "c.toml:6", "optim.rollout", 'did you mean "rollout"'),
    ("optim.lrr = 1.0\n" + TASK, [], "c.toml:1", "optim.lrr", 'did you mean "optim.lr"'),
    ("rollout = { top_x = 1 }\n" + TASK, [], "c.toml:1", "rollout.top_x", "rollout.top_"),
    (TASK + "[per_condition.grpo.optim]\nlrr = 1.0\n", [], "c.toml:6", "optim.lrr", "optim.lr"),
    (TASK + "[per_condition.gpro]\n", [], "c.toml:5", "per_condition.gpro", '"grpo"'),
    (TASK + "[rollout]\ntop-p = 0.5\n", [], "c.toml:6", "rollout.top-p", '"rollout.top_p"'),
    (TASK, ["--lr", "1e-3"], "--lr", "lr", 'did you mean "optim.lr"'),
    (TASK, ["--optim.step", "3"], "--optim.step", "optim.step", '"optim.steps"'),
    # Wrong types and values.
    (TASK + '[optim]\nlr = "fast"\n', [], "c.toml:6", "optim.lr", 'found "fast", must be a number'),
    (TASK + '[optim]\nsteps = "10"\n', [], "c.toml:6", "optim.steps", "an integer >= 1"),
    (TASK + "[optim]\nsteps = true\n", [], "c.toml:6", "optim.steps", "found true"),
    (TASK + "[optim]\nsteps = 0\n", [], "c.toml:6", "optim.steps", "an integer >= 1"),
    (TASK + "[optim]\nlr = inf\n", [], "c.toml:6", "optim.lr", "a number > 0"),
    (TASK + "[optim]\nbetas = [0.9]\n", [], "c.toml:6", "optim.betas", "a list of 2 numbers"),
    (TASK + "[optim]\nbetas = [0.9, 1.5]\n", [], "c.toml:6", "optim.betas", "< 1"),
    (TASK + "[loss]\nclip = -1\n", [], "c.toml:6", "loss.clip", "a number > 0 or none"),
    (TASK + '[rollout]\nstop = "a"\n', [], "c.toml:6", "rollout.stop", "a list of strings"),
    ("optim = 3\n" + TASK, [], "c.toml:1", "optim", "found 3, must be a table"),
    (TASK + '[teacher]\nkind = "old"\n', [], "c.toml:6", "teacher.kind", '"ema", "frozen"'),
    (TASK, ["--optim.lr", "nan"], "--optim.lr", "optim.lr", "a number > 0"),
    (TASK, ["--seed=x"], "--seed", "seed", 'found "x", must be an integer'),
    (TASK, ["--data.shuffle", "maybe"], "--data.shuffle", "data.shuffle", "true or false"),
    (TASK, ["--optim.steps"], "--optim.steps", "optim.steps", "needs a value"),
    ('device = "gpu"\n' + TASK, [], "c.toml:1", "device", '"cuda:N"'),
    ('run = "runs/{seed}"\n' + TASK, [], "c.toml:1", "run", "{condition} and {time}"),
    # Impossible together.
    (TASK + '[teacher]\nkind = "adapter_off"\n', [], "c.toml:6", "teacher.kind", "model.lora.r"),
    ('[data]\ntask = "chain_sum"\n', [], "", "model.name", "not set: name a model"),
    ('[model]\nname = "m"\n', [], "", "data.task", "set data.train and data.eval"),
    ('[model]\nname = "m"\n[data]\ntask = "sums"\n', [], "c.toml:4", "data.task", '"chain_sum"'),
    (ROWS, ["--condition=critique"], "--condition", "condition", "needs data.task"),
    (ROWS.replace("reference", "critique"), [], "c.toml:1", "condition", "needs data.task"),
    (ROWS, ["--condition", "all"], "--condition", "condition", "needs data.task"),
    (ROWS.replace('eval = "b.jsonl"\n', ""), [], "c.toml:4", "data.eval", "held-out rows"),
    (ROWS + 'task = "chain_sum"\n', [], "c.toml:5", "data.train", "one of the two"),
    (ROWS + 'columns = { text = "q" }\n', [], "c.toml:7", "data.columns.text", '"question"'),
    ('reward.function = "task"\n' + ROWS, [], "c.toml:1", "reward.function", "needs data.task"),
    (TASK, ["--reward.function", "a.b"], "--reward.function", "function", "module:function"),
    (TASK + '[prompt]\ncritique_template = "{feedback}{question}"\n', [], "c.toml:6",
     "prompt.critique_template", "must begin with {question}"),
    (TASK + '[prompt]\nreference_template = "{question}"\n', [], "c.toml:6",
     "prompt.reference_template", "{feedback} once"),
    (TASK + '[prompt]\nreference_template = "{question} {feedback} {hint}"\n', [], "c.toml:6",
     "prompt.reference_template", "unknown field {hint}"),
    (TASK, ["--condition", "grpo", "--rollout.samples-per-prompt", "1"],
     "--rollout.samples-per-prompt", "rollout.samples_per_prompt", "group of one"),
    (TASK, ["--loss.policy-weight", "0.5", "--rollout.samples-per-prompt", "1"],
     "--rollout.samples-per-prompt", "rollout.samples_per_prompt", "group of one"),
    (TASK + '[per_condition.grpo.rollout]\nsamples_per_prompt = 1\n', ["--condition", "all"],
     "c.toml:6", "per_condition.grpo.rollout.samples_per_prompt", "group of one"),
    (TASK, ["--loss.beta", "0.3"], "--loss.beta", "loss.beta", 'only "jsd" uses it'),
    (TASK + '[loss]\ndivergence = "sampled_token"\ntop_k = 8\n', [], "c.toml:7", "loss.top_k",
     "unset loss.top_k"),
    (TASK, ["--loss.divergence", "sampled_token", "--loss.entry-clip", "2"], "--loss.entry-clip",
     "loss.entry_clip", "unset loss.entry_clip"),
    (TASK, ["--loss.tail", "false"], "--loss.tail", "loss.tail", "only acts with loss.top_k"),
    (TASK, ["--loss.policy-weight", "-1"], "--loss.policy-weight", "loss.policy_weight", ">= 0"),
    (TASK, ["--condition", "grpo", "--loss.policy-weight", "0"], "--loss.policy-weight",
     "loss.policy_weight", "nothing would be trained"),
    (TASK, ["--condition", "grpo", "--loss.divergence-weight", "1"], "--loss.divergence-weight",
     "loss.divergence_weight", "grpo has no teacher"),
    (TASK + "[optim]\nsteps = 5\nwarmup_steps = 6\n", [], "c.toml:7", "optim.warmup_steps",
     "<= optim.steps = 5"),
    ('resume = "auto"\n' + TASK, [], "c.toml:1", "resume", "set run to the folder"),
    (TASK + '[per_condition.grpo]\nseed = 3\n', [], "c.toml:6", "per_condition.grpo.seed",
     "only sections"),
    # Critics and engines.
    (ROWS, ["--condition=critique"], "--condition", "condition", 'critic.kind to "local"'),
    (TASK.replace("chain_sum", "reasoning_gym"), [], "", "condition", "has no rules"),
    (TASK + '[critic]\nkind = "local"\n', [], "c.toml:5", "critic.model", "a Hugging Face name"),
    (TASK + '[critic]\nkind = "server"\nmodel = "m"\n', [], "c.toml:5", "critic.url", "base URL"),
    (TASK + '[critic]\nkind = "server"\nurl = "http://h/v1"\n', [], "c.toml:5", "critic.model",
     "serves"),
    (TASK + '[critic]\nkind = "replay"\n', [], "c.toml:5", "critic.file", "a .jsonl"),
    (SERVER + 'url = "ftp://h/v1"\n', [], "c.toml:8", "critic.url", "http:// or https://"),
    (SERVER + 'url = "127.0.0.1:8000/v1"\n', [], "c.toml:8", "critic.url", "http:// or https://"),
    (SERVER + 'url = "http://"\n', [], "c.toml:8", "critic.url", "name a host"),
    (SERVER + 'url = "http://[::1/v1"\n', [], "c.toml:8", "critic.url", "not a URL"),
    (SERVER + 'url = "http://h:port/v1"\n', [], "c.toml:8", "critic.url", "not a URL"),
    (SERVER + 'url = "http://me:pw@h/v1"\n', [], "c.toml:8", "critic.url", "critic.api_key_env"),
    (SERVER + 'url = "http://h/v1"\napi_key_env = "sk-12"\n', [], "c.toml:9",
     "critic.api_key_env", "not a key"),
    (TASK, ["--rollout.engine", "vllm"], "--rollout.engine", "rollout.engine", "rollout.servers"),
    (
        TASK + '[rollout]\nengine = "vllm"\nservers = ["http://a:1"]\ntop_k = 9\n',
        ["--rollout.temperature", "0.7"],
        "--rollout.temperature",
        "rollout.temperature",
        "use 1, or no top_k and top_p",
    ),
    (TASK + '[rollout]\nservers = ["localhost:8000"]\n', [], "c.toml:6", "rollout.servers",
     "http://"),
    (TASK + '[rollout]\nservers = ["http://h:1", "http://h:1/v1"]\n', [], "c.toml:6",
     "rollout.servers", "named twice"),
    (TASK + "[rollout]\nmax_staleness = 2\n", [], "c.toml:6", "rollout.max_staleness",
     'rollout.engine = "vllm"'),
    (
        TASK + '[rollout]\nengine = "vllm"\nservers = ["http://a:1"]\nmax_staleness = 1\n',
        ["--condition=grpo", "--loss.clip=none"],
        "c.toml:8",
        "rollout.max_staleness",
        "without loss.clip",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "flags", "where", "key", "fix"), MISTAKES)
def test_mistakes_are_located_with_the_fix(tmp_path, monkeypatch, text, flags, where, key, fix):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["c.toml", *flags])
    assert caught.value.exit_code == 2
    (line,) = caught.value.lines
    assert line.startswith(f"{where}: " if where else key)
    assert key.replace("_", "-") in line.replace("_", "-")
    assert fix in line


def test_syntax_errors_have_line_and_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text("seed = 1\n[optim\n")
    with pytest.raises(ConfigError, match=r"^c\.toml:2:7: not valid TOML"):
        load_config(["c.toml"])
    Path("c.toml").write_text("seed = 1\nrun = '''open")
    with pytest.raises(ConfigError, match=r"^c\.toml:2:14: not valid TOML"):
        load_config(["c.toml"])


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^no\.toml: No such file"):
        load_config(["no.toml"])
    Path("c.toml").write_bytes(b"seed = 1 # \xff\n")
    with pytest.raises(ConfigError, match=r"^c\.toml: not UTF-8 at byte 11"):
        load_config(["c.toml"])


def test_several_mistakes_come_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(TASK + "[optim]\nlr = 0\nstep = 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["c.toml", "--seed", "x"])
    starts = sorted(line.split(": ")[0] for line in caught.value.lines)
    assert starts == ["--seed", "c.toml:6", "c.toml:7"]
    assert str(caught.value).startswith("3 mistakes in the configuration:")


def test_later_sources_win_and_are_blamed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(TASK + "[optim]\nlr = 1e-3\nsteps = 7\n[loss]\nclip = 0.1\n")
    Path("b.toml").write_text('optim.lr = 2e-3\nloss.clip = "none"\n')
    invocation = load_config(["a.toml", "b.toml", "--optim.steps", "9"])
    assert invocation.config.optim.lr == 2e-3
    assert invocation.config.optim.steps == 9
    assert invocation.config.loss.clip is None
    assert invocation.sources == ("a.toml", "b.toml", "--optim.steps 9")
    assert not invocation.preset
    Path("b.toml").write_text("optim.lr = -1\n")
    with pytest.raises(ConfigError, match=r"^b\.toml:1: optim\.lr: found -1"):
        load_config(["a.toml", "b.toml"])


@pytest.mark.parametrize("example", sorted(p.name for p in EXAMPLES.glob("*.toml")))
def test_examples_load(example):
    assert load_config([str(EXAMPLES / example)]).config.model.name


def config_of(text: str) -> Config:
    return Config.model_validate(tomllib.loads(text))


def test_for_condition_merges_overrides_and_leaves_none():
    text = (
        'condition = "all"\n[per_condition.grpo.optim]\nlr = 2e-5\n[per_condition.critique.model]'
    )
    config = config_of(text + "\nlora = { r = 4 }\n")
    grpo = for_condition(config, "grpo")
    assert (grpo.condition, grpo.optim.lr, grpo.per_condition) == ("grpo", 2e-5, {})
    assert grpo.optim.steps == config.optim.steps
    assert for_condition(config, "reference").optim == config.optim
    critique = for_condition(config, "critique")
    assert critique.model.lora is not None and critique.model.lora.r == 4
    assert for_condition(grpo, "grpo") == grpo


def test_for_condition_refuses_what_does_not_fit():
    config = config_of("rollout.samples_per_prompt = 1\n")
    with pytest.raises(ConfigError, match="condition grpo: rollout.samples_per_prompt: a group"):
        for_condition(config, "grpo")


def test_an_idle_condition_may_be_impossible_but_not_misspelt():
    rows = {"train": "a.jsonl", "eval": "b.jsonl"}
    overrides = {"critique": {"optim": {"lr": 1e-3}}}
    Config(condition="grpo", data=rows, per_condition=overrides)
    with pytest.raises(ValueError, match=r"per_condition\.critique\.optim\.lx"):
        Config(condition="grpo", data=rows, per_condition={"critique": {"optim": {"lx": 1e-3}}})


NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda text: text != "none")
TREES = st.fixed_dictionaries(
    {},
    optional={
        "condition": st.sampled_from(["grpo", "reference", "critique", "all"]),
        "seed": st.integers(-(2**40), 2**40),
        "model": st.fixed_dictionaries(
            {"name": NAMES},
            optional={
                "freeze": st.lists(NAMES, max_size=3),
                "lora": st.none() | st.fixed_dictionaries({"r": st.integers(1, 99)}),
            },
        ),
        "prompt": st.fixed_dictionaries(
            {
                "system": st.none() | NAMES,
                "critique_template": NAMES.map(lambda s: "{question}{feedback}" + s),
                "teacher_template_kwargs": st.dictionaries(
                    NAMES, st.booleans() | st.integers(-9, 9) | NAMES, max_size=3
                ),
            }
        ).filter(lambda prompt: "{" not in prompt["critique_template"][20:]),
        "loss": st.fixed_dictionaries(
            {"clip": st.none() | st.floats(0, 9, exclude_min=True)},
            optional={"entropy_weight": st.floats(-9, 9), "top_k": st.none() | st.integers(1, 9)},
        ),
        "optim": st.fixed_dictionaries({"lr": st.floats(0, 1, exclude_min=True)}),
        "per_condition": st.fixed_dictionaries(
            {}, optional={"grpo": st.just({"optim": {"lr": 0.5}, "loss": {"clip": "none"}})}
        ),
    },
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_dump_loads_back_to_an_equal_config(tmp_path_factory, tree):
    base = {"model": {"name": "m"}, "data": {"task": "chain_sum"}}
    config = Config.model_validate(deep_merge(base, tree))
    if not config.model.name:
        return
    path = tmp_path_factory.getbasetemp() / "config.resolved.toml"
    path.write_text(dump_toml(config), encoding="utf-8", newline="")
    assert load_config([str(path)]).config == config


def test_dump_holds_every_setting_of_the_preset():
    config = load_config([]).config
    dumped = tomllib.loads(dump_toml(config))
    unset = [path for path, _ in leaves(Config) if not _holds(dumped, path)]
    assert all(_value(config, path) is None for path in unset)
    assert ("optim", "lr") not in unset


def _holds(tree: dict, path: tuple) -> bool:
    for part in path:
        if part not in tree:
            return False
        tree = tree[part]
    return True


def _value(section, path: tuple):
    for part in path:
        section = getattr(section, part) if section is not None else None
    return section


def test_critics_by_kind_serve_rows_and_are_left_alone_where_nobody_asks_them():
    rows = {"train": "a.jsonl", "eval": "b.jsonl"}
    server = {"kind": "server", "model": "m", "url": "http://127.0.0.1:8000/v1"}
    for critic in (server, {"kind": "local", "model": "m"}, {"kind": "replay", "file": "c.jsonl"}):
        assert Config(condition="critique", data=rows, critic=critic).critic.kind == critic["kind"]
    Config(condition="grpo", data=rows, critic={"kind": "server", "url": "nonsense"})
    with pytest.raises(ValueError, match="critic.url") as caught:
        Config(critic={**server, "url": "http://me:hunter2@h/v1"})
    assert "hunter2" not in caught.value.errors()[0]["msg"]
