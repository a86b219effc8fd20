output "arn" {
  description = "ARN that the service account is annotated with."
  value       = aws_iam_role.this.arn
}
