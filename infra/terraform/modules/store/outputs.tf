output "root" {
  description = "What a recipe's [storage] root is."
  value       = "s3://${aws_s3_bucket.artefacts.id}/${var.root_prefix}"
}

output "arn" {
  description = "ARN of the bucket, known before it is made."
  value       = local.arn
}
