"""What this project adds to Metaflow: the step decorators `@srun`, `@if_curable` and `@run_card`; found on the path
(`flows/sources.py`)."""

STEP_DECORATORS_DESC = [
    ("srun", ".srun_decorator.SrunDecorator"),
    ("if_curable", ".if_curable_decorator.IfCurableDecorator"),
    ("run_card", ".run_card_decorator.RunCardDecorator"),
]
