"""Completion scripts for bash, zsh and fish: sub-commands, options, recipes, settings and files.

The scripts are static, so a TAB starts no Python: names of recipes and settings are written into them. After an upgrade, the
script is written again.
"""

import argparse
from collections.abc import Iterator
from typing import Any

# What the shells run to list recipes and settings. A setting is completed up to its `=`, without a space behind it.
FUNCTIONS = {
    "bash": """
_rcnn_recipes() { compgen -W "@RECIPES@" -- "$1"; }
_rcnn_configs() { _rcnn_recipes "$1"; compgen -f -- "$1"; }
_rcnn_settings() { compgen -S = -W "@SETTINGS@" -- "$1"; }
""",
    "zsh": """
_rcnn_recipes() { compadd -- @RECIPES@ }
_rcnn_configs() { _rcnn_recipes; _files }
_rcnn_settings() { compadd -S = -- @SETTINGS@ }
""",
    "fish": """
function _rcnn_recipes
  printf '%s\\n' @RECIPES@
end
function _rcnn_settings
  printf '%s=\\n' @SETTINGS@
end
""",
}
SHELLS = tuple(FUNCTIONS)

# shtab calls the functions above in a subshell, from which bash's option to leave out the space cannot be set.
WITHOUT_SPACE = """
_rcnn_complete() {
  _shtab_rcnn "$@"
  if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace; fi
}
complete -o bashdefault -F _rcnn_complete rcnn
"""

CONFIG_NAMES = {
    "bash": "_rcnn_configs", "zsh": "_rcnn_configs", "fish": "(_rcnn_recipes) (__fish_complete_path (commandline -ct))",
}  # fmt: skip
RECIPE_NAMES = {"bash": "_rcnn_recipes", "zsh": "_rcnn_recipes", "fish": "(_rcnn_recipes)"}
SETTING_NAMES = {"bash": "_rcnn_settings", "zsh": "_rcnn_settings", "fish": "(_rcnn_settings)"}


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that makes `shell`, one of `SHELLS`, complete the command that `parser` reads."""
    import shtab  # late, as are the names: the command line imports this module for `SHELLS`

    from rcnn.recipes import RECIPES
    from rcnn.settings import setting_names

    completed = {  # how the values of an argument are completed, by the argument's destination
        "recipe": RECIPE_NAMES, "set": SETTING_NAMES, "config": shtab.FILE, "images": shtab.FILE, "to": shtab.DIRECTORY,
        "diff": CONFIG_NAMES,
    }  # fmt: skip
    for action in _actions(parser):
        if action.dest in completed:
            action.complete = completed[action.dest]  # type: ignore[attr-defined]
    functions = (
        FUNCTIONS[shell].replace("@RECIPES@", " ".join(RECIPES)).replace("@SETTINGS@", " ".join(setting_names()))
    )
    script = str(shtab.complete(parser, shell, preamble=functions))
    return script + WITHOUT_SPACE if shell == "bash" else script


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """The arguments of a command and of its sub-commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
