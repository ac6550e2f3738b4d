# SPDX-License-Identifier: Apache-2.0
"""Topologies: a YAML file that says what shall be, the difference to what is, and the steps that make it so.

``schema`` is what a file may say, ``plan`` compares (pure: no step is taken), ``apply`` takes the steps, ``owned``
remembers what belongs to which file, so that files and hand-made things never remove each other.
"""
