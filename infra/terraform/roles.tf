data "aws_partition" "current" {}

locals {
  namespace = "distill-ray"
  s3        = "arn:${data.aws_partition.current.partition}:s3:::"
  root      = "${module.store.arn}/${var.root_prefix}"
  read      = [for each in var.sources : "${local.s3}${each}*"]
  buckets   = distinct(concat([module.store.arn], [for each in var.sources : "${local.s3}${split("/", each)[0]}"]))

  # What each workload does to the objects of the root, action by action. Nobody may delete a version: whatever is
  # overwritten or deleted can be brought back until lifecycle_days.noncurrent.
  workloads = {
    # Runs every verb, publishes, prunes, collects garbage.
    driver = {
      "s3:GetObject"                = ["*"]
      "s3:PutObject"                = ["*"]
      "s3:DeleteObject"             = ["*"]
      "s3:AbortMultipartUpload"     = ["*"]
      "s3:ListMultipartUploadParts" = ["*"]
    }
    # Reads the corpus, writes target objects, one PUT each; removes nothing.
    teacher = {
      "s3:GetObject" = ["targets/*"]
      "s3:PutObject" = ["targets/*"]
    }
    # Reads targets and students; uploads shards and students, publishes them in the run's record, prunes checkpoints.
    student = {
      "s3:GetObject"            = ["targets/*", "runs/*"]
      "s3:PutObject"            = ["runs/*/checkpoints/*", "runs/*/student/*", "runs/*/lease.json", "runs/*/metrics.jsonl"]
      "s3:DeleteObject"         = ["runs/*/checkpoints/*", "runs/*/student/*"]
      "s3:AbortMultipartUpload" = ["runs/*/checkpoints/*", "runs/*/student/*"]
    }
  }
}

data "aws_iam_policy_document" "workload" {
  for_each = local.workloads

  # A HEAD of an object that is missing answers 403 instead of 404 to those who may not list.
  statement {
    sid       = "List"
    actions   = each.key == "driver" ? ["s3:ListBucket", "s3:ListBucketMultipartUploads"] : ["s3:ListBucket"]
    resources = local.buckets
  }

  statement {
    sid       = "Sources"
    actions   = ["s3:GetObject"]
    resources = local.read
  }

  dynamic "statement" {
    for_each = each.value

    content {
      sid       = replace(statement.key, ":", "")
      actions   = [statement.key]
      resources = [for path in statement.value : "${local.root}/${path}"]
    }
  }
}

module "workload" {
  for_each        = local.workloads
  source          = "./modules/role"
  name            = "${var.name}-${each.key}"
  oidc            = module.cluster.oidc
  namespace       = local.namespace
  service_account = "distill-ray-${each.key}"
  policy          = data.aws_iam_policy_document.workload[each.key].json
}

# Adds and removes the nodes. AWS knows no resource for the Describe calls.
data "aws_iam_policy_document" "autoscaler" {
  statement {
    sid = "Look"
    actions = [
      "autoscaling:DescribeAutoScalingGroups",
      "autoscaling:DescribeAutoScalingInstances",
      "autoscaling:DescribeLaunchConfigurations",
      "autoscaling:DescribeScalingActivities",
      "autoscaling:DescribeTags",
      "ec2:DescribeImages",
      "ec2:DescribeInstanceTypes",
      "ec2:DescribeLaunchTemplateVersions",
      "ec2:GetInstanceTypesFromInstanceRequirements",
    ]
    resources = ["*"]
  }

  statement {
    sid       = "Groups"
    actions   = ["eks:DescribeNodegroup"]
    resources = ["arn:${data.aws_partition.current.partition}:eks:${var.region}:*:nodegroup/${var.name}/*"]
  }

  statement {
    sid       = "Scale"
    actions   = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
    resources = ["arn:${data.aws_partition.current.partition}:autoscaling:${var.region}:*:autoScalingGroup:*"]

    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/k8s.io/cluster-autoscaler/${var.name}"
      values   = ["owned"]
    }
  }
}

module "autoscaler" {
  source          = "./modules/role"
  name            = "${var.name}-autoscaler"
  oidc            = module.cluster.oidc
  namespace       = "kube-system"
  service_account = "cluster-autoscaler"
  policy          = data.aws_iam_policy_document.autoscaler.json
}
