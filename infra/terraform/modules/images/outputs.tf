output "urls" {
  description = "Repository of each image, by role."
  value       = { for role, repository in aws_ecr_repository.image : role => repository.repository_url }
}
