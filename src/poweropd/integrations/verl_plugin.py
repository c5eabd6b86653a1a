"""The entry point that verl imports: importing this registers the losses of `verl.py`."""

from poweropd.integrations.verl import register_losses

register_losses()
