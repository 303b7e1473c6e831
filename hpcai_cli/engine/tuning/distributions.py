"""The values of a search's parameters as Optuna describes them."""

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hpcai_cli.search_space import Parameter


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """Return what Optuna records of a parameter."""
    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.choices)
    kind = IntDistribution if parameter.kind == "int" else FloatDistribution
    return kind(parameter.low, parameter.high, log=parameter.log)
