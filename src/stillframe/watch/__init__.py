"""What users see of saves: progress, reports, and failures."""
