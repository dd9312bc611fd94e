"""What is no stage: the sheet, the configuration, the check of the machine."""
