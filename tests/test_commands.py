"""What the commands share."""

import argparse

import pytest

from atc_diffusion.commands import Several


@pytest.mark.parametrize(
    ("given", "got"),
    [("", ["ant"]), ("--prompt bee", ["bee"]), ("--prompt bee --prompt cat dog", ["bee", "cat", "dog"])],
)
def test_an_option_of_several_values_may_be_given_again(given, got):
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", action=Several, default=["ant"])
    assert parser.parse_args(given.split()).prompt == got
