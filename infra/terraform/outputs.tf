output "root" {
  description = "What a recipe's [storage] root is."
  value       = module.store.root
}

output "cluster" {
  description = "Name of the EKS cluster."
  value       = module.cluster.name
}

output "images" {
  description = "Repository of each image, by role."
  value       = module.images.urls
}

output "roles" {
  description = "Role of each workload's service account, and of the autoscaler's."
  value       = merge({ for role, each in module.workload : role => each.arn }, { autoscaler = module.autoscaler.arn })
}
