"""What several test files share: networks, pipelines, what runs beside a patch, and a device that is not there."""
