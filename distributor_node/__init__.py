"""The one installed package. `services` and `shared` are links to the folders of the checkout.

Two top-level packages with names as common as these would collide with other distributions in site-packages.
"""
