"""What this project adds to Metaflow: the step decorator `@srun`; found on the path (`flows/sources.py`)."""

STEP_DECORATORS_DESC = [("srun", ".srun_decorator.SrunDecorator")]
