"""What this project adds to Metaflow: the step decorators `@srun` and `@if_curable`; found on the path
(`flows/sources.py`)."""

STEP_DECORATORS_DESC = [
    ("srun", ".srun_decorator.SrunDecorator"),
    ("if_curable", ".if_curable_decorator.IfCurableDecorator"),
]
