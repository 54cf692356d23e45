"""Lists the models that may run their own Python code (`trust_remote_code`)."""

from collections.abc import Iterator

from engine.config.schema import RunConfig


def trusted_code(config: RunConfig) -> Iterator[str]:
    """Yields a sentence for each model whose code may run, for the history and the operator."""
    model = config.model
    rewards = [*config.reward.sources(), *config.eval.rewards]
    models = [
        ("model.policy", model.policy, model.revision, model.trust_remote_code),
        (
            "model.reference",
            model.reference,
            model.reference_revision,
            model.trust_remote_code,
        ),
        *(("reward.model", s.model, s.revision, s.trust_remote_code) for s in rewards),
    ]
    for key, name, revision, trusted in models:
        if trusted and name is not None:
            at = f" (revision {revision})" if revision else ""
            yield f"{key}: Python code that comes with {name}{at} may run: trust_remote_code is on"
