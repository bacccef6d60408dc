from blora_pyro.fitting.history import DevError, Step


def test_a_step_is_stored_by_name_and_without_a_norm_that_is_not_known():
    step = Step(3, 2.5, 2.0, None, 1e-3, 50)
    stored = {"step": 3, "loss": 2.5, "nll": 2.0, "kl": None, "lr": 1e-3, "tokens": 50}
    assert step.to_json() == {**stored, "regularizer": 0.0}
    with_norm = Step(**stored, grad_norm=4.0)
    assert Step(**with_norm.to_json()) == with_norm and with_norm.to_json()["grad_norm"] == 4.0


def test_a_dev_error_is_stored_without_what_was_not_measured():
    assert DevError(3, 0.5).to_json() == {"step": 3, "error": 0.5}
    assert DevError(3, 0.5, 0.0).to_json() == {"step": 3, "error": 0.5, "forgetting": 0.0}
