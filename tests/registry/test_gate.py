from rcnn.registry.gate import Standing, judge

NEW = Standing(2, 0.02, "same")


def test_the_first_model_is_champion() -> None:
    assert judge(NEW, None).alias == "champion"


def test_only_a_strictly_better_model_is_promoted() -> None:
    assert judge(NEW, Standing(1, 0.03, "same")).alias == "champion"
    assert judge(NEW, Standing(1, 0.02, "same")).alias == "challenger"
    assert judge(NEW, Standing(1, 0.01, "same")).alias == "challenger"


def test_models_measured_on_other_rows_are_not_compared() -> None:
    verdict = judge(NEW, Standing(1, 0.9, "other"))
    assert verdict.alias == "challenger"
    assert "cannot be compared" in verdict.reason
