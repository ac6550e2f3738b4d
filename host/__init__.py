# SPDX-License-Identifier: Apache-2.0
"""The host's part of ringbar: clusters, attachments of VMs, measurements."""
