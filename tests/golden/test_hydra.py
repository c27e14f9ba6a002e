"""Configurations composed by espalier and by hydra-core: the same values, the same order of keys, and
a refusal where hydra-core refuses. compose_tool is espalier's side, built from pipeline/config alone."""

import json
import logging
import os
import pathlib
import subprocess
import warnings

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import OmegaConf

import hydra_cases
import hydra_lists

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

SOURCE = pathlib.Path(os.environ.get("ESPALIER_SOURCE", pathlib.Path(__file__).parents[2]))
BUILD = pathlib.Path(os.environ.get("ESPALIER_BUILD", SOURCE / "build"))
CONFIGS = SOURCE / "configs"
RUNS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

os.environ.update(HCE="12", HCL="[1,{a: 2}]", HCN="null")
os.environ.setdefault("ESPALIER_TABLES", "tables")  # which configs/table_*.yaml read


def ask(directory, name="config", mode="plain", overrides=()):
    """(True, value) or (False, message) of compose_tool."""
    return ask_all([(directory, name, mode, overrides)])[0]


def ask_all(requests):
    blocks = "".join("\n".join([str(directory), name, mode, *overrides]) + "\n\n"
                     for directory, name, mode, overrides in requests)
    run = subprocess.run([BUILD / "tests" / "compose_tool"], input=blocks, capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    answers = run.stdout.removesuffix("\n").split("\n")
    assert len(answers) == len(requests)
    return [(line.startswith("ok "), json.loads(line.split(" ", 1)[1])) for line in answers]


def hydra_composes(directory, name, overrides, *resolves):
    """For each of `resolves` (True, value) or (False, message) of hydra-core, which composes once: it is slow."""
    def answer(work):
        try:
            return True, work()
        except Exception as error:  # whatever it is, it is a refusal
            return False, f"{type(error).__name__}: {error}"

    def composed():
        with initialize_config_dir(version_base=None, config_dir=str(directory)):
            return compose(name, overrides=list(overrides))

    accepted, config = answer(composed)
    return [answer(lambda: OmegaConf.to_container(config, resolve=resolve)) if accepted else (False, config)
            for resolve in resolves]


def text_keys(value):
    """JSON has only text for keys."""
    if isinstance(value, dict):
        return {str(key).lower() if isinstance(key, bool) else str(key): text_keys(item)
                for key, item in value.items()}
    return [text_keys(item) for item in value] if isinstance(value, list) else value


def canonical(value):
    return json.dumps(text_keys(value))  # keeps the order of keys, tells 1 from 1.0 and true


def compare(tmp_path, cases):
    """cases: (files, overrides, primary name). Every one both as written and resolved."""
    requests = []
    for index, (files, overrides, name) in enumerate(cases):
        directory = tmp_path / str(index)
        for path, text in files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text)
        requests += [(directory, name, mode, overrides) for mode in ("plain", "resolved")]
    hydras = []
    for directory, name, _, overrides in requests[::2]:
        hydras += hydra_composes(directory, name, overrides, False, True)
    wrong = []
    for request, (accepted, ours), (composed, theirs) in zip(requests, ask_all(requests), hydras):
        directory, name, mode, overrides = request
        if composed != accepted or (composed and canonical(theirs) != canonical(ours)):
            files = cases[int(directory.name)][0]
            wrong.append(f"{files} {overrides} {mode}\n  hydra-core: {theirs}\n  espalier:   {ours}")
    assert not wrong, f"{len(wrong)} of {len(requests)} differ\n" + "\n".join(wrong[:10])


@pytest.mark.parametrize("name", RUNS)
def test_named_run_composes_as_hydra_composes_it(name):
    [(composed, theirs)] = hydra_composes(CONFIGS, name, [], False)
    assert composed, theirs
    accepted, ours = ask(CONFIGS, name)
    assert accepted, ours
    assert canonical(ours) == canonical(theirs)


@pytest.mark.parametrize("name", RUNS)
def test_named_run_takes_the_commands_of_the_manual(name):
    overrides = ["model.path=/models/llama", "prune=sparsegpt", "prune.sparsity=null",
                 "prune.pattern=2:4", "data.train=${oc.env:HOME}/train.h5", "retrain.steps=10",
                 "++prune.overrides=[{match: '*.q_proj', skip: true}]", "run.seed=3",
                 "+prune_again={stage: prune, method: wanda}"]
    [(composed, theirs)] = hydra_composes(CONFIGS, name, overrides, True)
    assert composed, theirs
    accepted, ours = ask(CONFIGS, name, "resolved", overrides)
    assert accepted, ours
    assert canonical(ours) == canonical(theirs)


def test_overrides_mean_the_same(tmp_path):
    compare(tmp_path, [({"config.yaml": tree}, [override], "config")
                       for tree, overrides in [(hydra_cases.SMALL_TREE, hydra_cases.SMALL_OVERRIDES),
                                               (hydra_cases.TREE, hydra_cases.TREE_OVERRIDES)]
                       for override in overrides])


def test_interpolations_mean_the_same(tmp_path):
    compare(tmp_path, [({"config.yaml": hydra_cases.TEXT_TREE + json.dumps(text, ensure_ascii=False)},
                        [], "config") for text in hydra_cases.TEXTS])


def test_yaml_files_mean_the_same(tmp_path):
    compare(tmp_path, [({"config.yaml": text}, [], "config") for text in hydra_cases.DOCUMENTS])


def test_defaults_lists_packages_and_merges_mean_the_same(tmp_path):
    cases = []
    for config, files, overrides, *name in hydra_lists.LISTS:
        everything = {**hydra_cases.GROUP, **files, "config.yaml": config}
        cases.append((everything, overrides, name[0] if name else "config"))
    compare(tmp_path, cases)


@pytest.mark.parametrize("name", RUNS)
def test_yaml_output_reads_as_hydras_output(name):
    with initialize_config_dir(version_base=None, config_dir=str(CONFIGS)):
        theirs = OmegaConf.to_yaml(compose(name))
    accepted, ours = ask(CONFIGS, name, "yaml")
    assert accepted, ours
    assert canonical(OmegaConf.to_container(OmegaConf.create(ours))) == \
        canonical(OmegaConf.to_container(OmegaConf.create(theirs)))


def test_yaml_output_of_texts_that_look_like_something_else_reads_back(tmp_path):
    texts = ["1", "1e3", "2:4", "yes", "~", "null", "", " a", "a ", "a: b", "a #b", "- a", "-", "[a]",
             "{a", "'q'", '"q"', "it's", "a\nb", "a\n", "\ttab", "2020-01-01", "=", "<<", "!x", "&x",
             "*x", "%x", "@x", "`x`", "|", ">", "?", ": a", "a:", "0x1F", "0o17", "017", "1_000", ".5",
             ".inf", "y", "N", "é", "---", "...", "#", "${b}", "\\${b}", "a\\b", "\x07", "off"]
    source = {"t": texts, "k": {text: 1 for text in texts}, "b": 1, "f": [1e-5, 1e20, 0.1, -0.0, 1.0],
              "e": [[], {}, [[1], [{"a": [2]}]], {"x": {"y": []}}]}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(source)))
    [(composed, theirs)] = hydra_composes(tmp_path, "config", [], False)
    assert composed, theirs
    accepted, ours = ask(tmp_path, "config", "yaml")
    assert accepted, ours
    assert canonical(OmegaConf.to_container(OmegaConf.create(ours))) == canonical(theirs)


@pytest.mark.parametrize("name", RUNS)
def test_defaults_list_is_hydras(name):
    overrides = ["prune=sparsegpt", "~discover", "+prune@prune_again=wanda"]
    with initialize_config_dir(version_base=None, config_dir=str(CONFIGS)):
        loader = GlobalHydra.instance().config_loader()
        listed = loader.compute_defaults_list(name, overrides, RunMode.RUN).defaults
    theirs = [[row.config_path, row.package or "", str(row.is_self), row.parent] for row in listed
              if not row.config_path.startswith("hydra/")]
    accepted, ours = ask(CONFIGS, name, "defaults", overrides)
    assert accepted, ours
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in ours.splitlines()
            if line.startswith("|")]
    assert rows[1:] == theirs


SWEEPS = [
    ["prune=wanda,sparsegpt", "prune.pattern=2:4,unstructured"],
    ["prune=glob(*)"], ["prune=glob([w*,s*],exclude=wanda)"], ["run.seed=range(1,4)", "run.name=a,b"],
    ["run.seed=range(0,1,0.1)"], ["run.seed=range(10,1,-3)"], ["run.seed=range(1.5,3)"],
    ["run.seed=range(start=3,stop=1,step=-1)"], ["run.seed=choice(1,x,'y z',\"q\",[1,2],{a:b c})"],
    ["run.seed=int(choice(1.5,2))"], ["run.seed=float(range(1,3))"], ["run.seed=sort(3,1,2)"],
    ["run.seed=sort(b,a,c,reverse=true)"], ["run.seed=sort(range(1,4),reverse=true)"],
    ["run.seed=tag(t,choice(1,2))"], ["run.seed=str(1,2)"], ["+x=null,TRUE,1.50,1e3,''"],
    ["+x=a b,c\\,d,'it\\'s',e:f"], ["~discover", "run.seed=1"], ["++x=[1,2],[3]", "run.seed="],
    ["run.seed=1,2", "run.seed=3,4"], ["+x=a,b", "++x=c"], ["prune@p=wanda,magnitude"], ["run.seed=5"],
    ["run.seed=interval(0,1)"], ["run.seed=choice()"], ["run.seed=1,choice(2,3)"],
    ["run.seed=range(1,3,0)"], ["run.seed=choice(choice(1))"], ["run.seed=str(range(1,3))"],
    ["run.seed=1,"], ["run.seed=,1"], ["run.seed=[1,2"], ["x y=1"], ["run.seed=glob(1)"],
]


@pytest.mark.parametrize("overrides", SWEEPS, ids=" ".join)
def test_sweep_has_hydras_members_in_hydras_order(overrides):
    with initialize_config_dir(version_base=None, config_dir=str(CONFIGS)):
        try:
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            batches = BasicSweeper.split_arguments(parser.parse_overrides(overrides), None)
            theirs = [list(member) for batch in batches for member in batch]
        except Exception as error:
            theirs = error
    accepted, ours = ask(CONFIGS, "default", "sweep", overrides)
    assert accepted == isinstance(theirs, list), (theirs, ours)
    assert not accepted or ours == theirs


def test_override_dirname_is_hydras():
    overrides = ["run.seed=2", "prune=sparsegpt", "+x={a: [1,2]}", "~discover", "++y='q r'",
                 "prune.pattern=2:4"]
    with initialize_config_dir(version_base=None, config_dir=str(CONFIGS)):
        theirs = compose("default", overrides=overrides, return_hydra_config=True)
    accepted, ours = ask(CONFIGS, "default", "dirname", overrides)
    assert accepted, ours
    assert ours == theirs.hydra.job.override_dirname


# What hydra-core takes and espalier refuses on purpose, with a message that says why.
REFUSED = [
    ("a: ${now:%Y}", [], "resolver now"), ("a: ${hydra:job.name}", [], "resolver hydra"),
    ("a: 99999999999999999999", [], "64 bits"), ("a: 1", ["a=99999999999999999999"], "64 bits"),
    ("a: ${oc.create:'x'}", [], "a list or a mapping"),
    ("a: 1", ["hydra.job.name=x"], "configures Hydra itself"),
    ("a: !!omap [x: 1]", [], "tag"), ("a: !!binary aGk=", [], "tag"),
    ("defaults:\n- override hydra/job_logging: disabled\n", [], "configures Hydra itself"),
]


@pytest.mark.parametrize("config, overrides, reason", REFUSED)
def test_what_is_not_taken_from_hydra_is_refused_with_the_reason(tmp_path, config, overrides, reason):
    (tmp_path / "config.yaml").write_text(config)
    accepted, message = ask(tmp_path, "config", "resolved", overrides)
    assert not accepted
    assert reason in message
