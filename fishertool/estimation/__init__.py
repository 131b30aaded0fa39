"""An estimate of the Fisher as a job: what is asked for, divided, saved on the way, written."""
