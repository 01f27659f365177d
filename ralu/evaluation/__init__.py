"""`ralu evaluate`: prompts run with several methods into one folder, scored, and reported on one HTML page.

Every file is written beside its place and then renamed, so a folder is whole at any moment: a run that was killed goes
on where it was. `python -m ralu.evaluation FOLDER METRIC ...` scores a folder whose images are there, in an environment
that needs no diffusers: for a package that does not get along with this one's requirements.
"""
